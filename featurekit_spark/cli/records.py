"""Keeps the record of a run when it ends, however it ends. A record that cannot be written is a warning, never the
run's failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurekit_spark.cli.shared import aside

if TYPE_CHECKING:
    from featurekit_spark.cli.report import RunReport

__all__ = ["keep_record"]


def keep_record(report: RunReport) -> None:
    """Write document and page of a run that came as far as having settings: they say where its warehouse is."""
    if report.settings is None:
        return
    from featurekit_spark.report.record import run_document
    from featurekit_spark.report.store import RunStore

    try:
        document = run_document(
            report.facts,
            started=report.started,
            ended=report.ended,
            execution=report.execution,
            errors=report.errors,
            settings=report.settings,
        )
        report.facts["page"] = RunStore(report.settings.warehouse).write(document)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        aside(f"warning: the record of run {report.run_id} could not be written: {told}")
