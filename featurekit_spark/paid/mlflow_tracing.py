"""Traces of paid calls in MLflow: a trace for each, with a span below it for each sampled call.

Knows MLflow's client and the traces it is given; what is in them, and when they are sent, is decided in `tracing`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

from featurekit_spark.errors import ConfigError, ServiceError
from featurekit_spark.paid.tracing import CallTrace, SampledCall

__all__ = ["MlflowTraces"]

_LOGGERS: Final = ("mlflow.tracing.fluent", "mlflow.tracing.export.mlflow_v3")
# MLflow tries for many minutes by default; a trace is not worth that. Where the user has set them, these stand.
_DEFAULTS: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


@dataclass(frozen=True)
class MlflowTraces:
    """`uri`: of the tracking server or store, None for what MLflow itself is configured with; `experiment`: by name,
    made where it is missing."""

    experiment: str
    uri: str | None = None

    def __post_init__(self) -> None:
        if find_spec("mlflow") is None:
            raise ConfigError(
                "llm.tracing.provider is 'mlflow', but mlflow is not installed: "
                "pip install 'featurekit-spark[mlflow]', or choose --set llm.tracing.provider=none."
            )

    @contextmanager
    def open(self) -> Iterator[Callable[[CallTrace], None]]:
        with _settings():
            import mlflow

            uri = self.uri or mlflow.get_tracking_uri()
            client = mlflow.MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(self.experiment)
            place = client.create_experiment(self.experiment) if found is None else found.experiment_id

            def send(trace: CallTrace) -> None:
                _write(mlflow, place, trace)
                if failures:
                    raise ServiceError(failures[0])

            with _tracking(mlflow, uri), _told_of_failures() as failures:
                yield send
                _flush(mlflow)
                if failures:
                    raise ServiceError(failures[0])


def _write(mlflow: Any, experiment_id: str, trace: CallTrace) -> None:
    started, ended = (int(at.timestamp() * 1e9) for at in (trace.started, trace.ended))
    failed = sum(trace.errors.values())
    told: dict[str, Any] = {
        "builder": trace.builder,
        "run_id": trace.run_id,
        "model": trace.model,
        "micro_batches": trace.micro_batches,
        "calls": trace.calls,
        "failed": failed,
        **{f"errors.{kind}": count for kind, count in trace.errors.items()},
        "tokens": trace.tokens,
        "usd": trace.usd,
        "seconds": round(trace.seconds, 6),
        "sampled": len(trace.sampled),
    }
    told = {name: value for name, value in told.items() if value is not None}
    tags = {f"featurekit.{name}": str(told[name]) for name in ("builder", "run_id", "model") if name in told}
    root = mlflow.start_span_no_context(
        f"{trace.builder} calls",
        span_type="CHAIN",
        attributes=told,
        tags=tags,
        experiment_id=experiment_id,
        start_time_ns=started,
    )
    for call in trace.sampled:
        _write_call(mlflow, root, call, started, ended)
    root.set_status("ERROR" if failed == trace.calls else "OK")
    root.end(end_time_ns=ended)


def _write_call(mlflow: Any, root: Any, call: SampledCall, started: int, ended: int) -> None:
    facts = {"entry_id": call.entry_id, "seconds": call.seconds, "tokens": call.tokens, "usd": call.usd}
    span = mlflow.start_span_no_context(
        "call",
        span_type="LLM",
        parent_span=root,
        inputs={"prompt": call.prompt},
        attributes={
            name: value for name, value in {**facts, "error": call.error}.items() if value is not None
        },
        start_time_ns=started,
    )
    span.set_outputs(call.answer)
    span.set_status("OK" if call.error is None else "ERROR")
    span.end(end_time_ns=ended)


@contextmanager
def _settings() -> Iterator[None]:
    """MLflow's own settings are variables of the environment: set while traces are written, unless they are."""
    before = {name: os.environ.get(name) for name in _DEFAULTS}
    os.environ.update({name: value for name, value in _DEFAULTS.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextmanager
def _tracking(mlflow: Any, uri: str) -> Iterator[None]:
    """Where MLflow writes is the process's own setting; a notebook's is as it was afterwards."""
    before = mlflow.get_tracking_uri()
    if uri != before:
        mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        if uri != before:
            mlflow.set_tracking_uri(before)


def _flush(mlflow: Any) -> None:
    """Where the user has MLflow write in the background, what it has not written yet."""
    if os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"].lower() in ("true", "1"):
        mlflow.flush_trace_async_logging()


@contextmanager
def _told_of_failures() -> Iterator[list[str]]:
    """MLflow logs a trace that it could not write, and goes on; here its words are, in place of the log."""
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        said.append(record.getMessage())
        return False

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
