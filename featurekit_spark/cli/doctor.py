"""`featurekit doctor`: are this machine and these settings ready for a run? Owns which checks are made, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.shared import Answer, Engine, EngineKind, OpenOptions, Output, answering, aside, say
from featurekit_spark.cli.wording import counted
from featurekit_spark.errors import ConfigError

if TYPE_CHECKING:
    from featurekit_spark.doctor import Check
    from featurekit_spark.settings import Settings

__all__ = ["doctor_command"]


@answering
def doctor_command(
    options: OpenOptions,
    engine: Engine = None,
    spark: Annotated[
        bool, typer.Option("--spark", help="Also start Spark and write a small Delta table (half a minute).")
    ] = False,
) -> Answer:
    """Check this machine, and everything that a run would use.

    Python, Java, versions, Delta's jars, paths and locks, Redis, the model's server, the catalog.
    Nothing is paid and nothing is left behind. Exit code 0 when nothing fails (warnings do not count), else 3.

    Example: featurekit doctor --conf-file conf/dev.yaml --merchant demo --market US --spark
    """
    options.both_or_neither()
    checks = []
    for check in _checks(options, engine, spark):
        checks.append(check)
        if options.output is Output.TEXT:  # as they come: some take a while
            say("\n".join(_told(check)))
    from featurekit_spark.doctor import Status, worst

    status = worst(checks)
    counts = {name: sum(check.status is name for check in checks) for name in Status}
    warnings = counted(counts[Status.WARN], "warning")
    return Answer(
        {"status": status, "checks": [asdict(check) for check in checks]},
        [f"{counts[Status.OK]} ok, {warnings}, {counts[Status.FAIL]} failed"],
        code=ExitCode.CONFIG if status is Status.FAIL else ExitCode.OK,
    )


def _checks(options: OpenOptions, engine: EngineKind | None, start_spark: bool) -> Iterator[Check]:
    from featurekit_spark.doctor import machine
    from featurekit_spark.doctor.base import fail, ok

    settings = None
    try:
        settings = options.settings(engine)
        yield ok("settings", f"of {options.conf_file or 'defaults, variables and --set'}: no mistakes")
    except ConfigError as error:
        yield fail(
            "settings", str(error), "Correct it; `featurekit config show` tells where each value is from."
        )
    spark_needed = settings is None or settings.engine.kind == "spark"
    versions = machine.installed()
    yield machine.python()
    yield machine.java(os.environ, needed=spark_needed)
    yield machine.packages(versions, spark_needed=spark_needed)
    home = machine.spark_home(os.environ)
    if spark_needed and home is not None:
        conf = machine.spark_conf(home, os.environ)
        yield machine.spark_environment(os.environ)
        yield machine.jars(home, conf, versions)
        yield machine.archive(conf)
    if start_spark:
        aside("starting Spark ...")
        yield machine.spark_starts()
    if settings is not None:
        yield from _of_settings(settings, options.merchant, options.market)


def _of_settings(settings: Settings, merchant: str | None, market: str | None) -> Iterator[Check]:
    from featurekit_spark.doctor import services, storage
    from featurekit_spark.settings import RedisSinkSettings

    places = {"warehouse": settings.warehouse}
    if settings.cache.kind == "delta":
        places["cache"] = settings.cache_path
    for name, place in places.items():
        options = settings.cache.storage_options if name == "cache" else None
        yield storage.writable(name, place, options)
    last = list(places.values())[-1]
    yield storage.several_writers("several writers", last)
    yield storage.disk("disk", last)
    for sink in settings.sinks:
        if isinstance(sink, RedisSinkSettings):
            yield services.redis_sink(sink)
    yield services.model(settings.llm, os.environ)
    yield services.embedder(settings.embedder, os.environ)
    if merchant is not None and market is not None:
        yield from _of_merchant(settings, merchant, market)


def _of_merchant(settings: Settings, merchant: str, market: str) -> Iterator[Check]:
    from featurekit_spark import aio
    from featurekit_spark.bootstrap import Bootstrap
    from featurekit_spark.doctor import services
    from featurekit_spark.doctor.base import fail, ok

    boot = Bootstrap(settings, merchant=merchant, market=market)
    yield services.catalog(
        lambda: aio.run(boot.get_product_db().get_product_attribute_dimensions()),
        settings.product_db.title_attribute,
        f"{merchant} in {market}, {settings.product_db.kind} at {settings.product_db.path}",
    )
    if settings.cache.base is not None:
        try:
            boot.get_feature_cache()
            yield ok("cache.base", f"read through: {settings.cache.base}")
        except ConfigError as error:
            yield fail("cache.base", str(error), "Correct cache.base, or leave it out.")
    try:
        names = ", ".join(builder.name for builder in boot.get_logic_builders())
        yield ok("logic builders", f"{names} over {boot.get_logic_keys().name}")
    except ConfigError as error:
        yield fail(
            "logic builders", str(error), "Correct logic_builders or logic_keys, or install their package."
        )


def _told(check: Check) -> Iterator[str]:
    yield f"{check.status.upper():<5} {check.name}: {check.found}"
    if check.advice:
        yield f"      -> {check.advice}"
