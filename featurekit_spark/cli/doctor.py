"""`featurekit doctor`: are this machine and these settings ready for a run? Owns which checks are made, in order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurekit_spark.cli.config_commands import NOBODY
from featurekit_spark.cli.exit_codes import ExitCode
from featurekit_spark.cli.shared import (
    ConfFile,
    Engine,
    Output,
    OutputOption,
    Overrides,
    guarded,
    print_json,
    settings_of,
)
from featurekit_spark.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from featurekit_spark.doctor import Check
    from featurekit_spark.settings import Settings

__all__ = ["doctor_command"]


def doctor_command(
    merchant: Annotated[
        str | None, typer.Option(help="Check this merchant's settings and catalog as well.")
    ] = None,
    market: Annotated[str | None, typer.Option(help="The market of that catalog, such as US.")] = None,
    conf_file: ConfFile = None,
    overrides: Overrides = None,
    engine: Engine = None,
    spark: Annotated[
        bool, typer.Option("--spark", help="Also start Spark and write a small Delta table (half a minute).")
    ] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check this machine, and everything that a run would use.

    Python, Java, versions, Delta's jars, paths and locks, Redis, the model's server, the catalog.
    Nothing is paid and nothing is left behind. Exit code 0 when nothing fails (warnings do not count), else 3.

    Example: featurekit doctor --conf-file conf/dev.yaml --merchant demo --market US --spark
    """
    with guarded(output):
        if (merchant is None) != (market is None):
            raise UsageError("give --merchant and --market together, or neither of them.")
        checks = []
        for check in _checks(merchant, market, conf_file, overrides, engine, spark):
            checks.append(check)
            if output is Output.TEXT:
                print("\n".join(_told(check)), flush=True)
        from featurekit_spark.doctor import Status, worst

        status = worst(checks)
        if output is Output.JSON:
            print_json({"status": status, "checks": [asdict(check) for check in checks]})
        else:
            counts = {name: sum(check.status is name for check in checks) for name in Status}
            print(f"{counts[Status.OK]} ok, {counts[Status.WARN]} warnings, {counts[Status.FAIL]} failed")
        if status is Status.FAIL:
            raise typer.Exit(ExitCode.CONFIG)


def _checks(
    merchant: str | None,
    market: str | None,
    conf_file: Path | None,
    overrides: list[str] | None,
    engine: str | None,
    start_spark: bool,
) -> Iterator[Check]:
    from featurekit_spark.doctor import machine
    from featurekit_spark.doctor.base import fail, ok

    settings = None
    try:
        settings = settings_of(merchant or NOBODY, market or NOBODY, conf_file, overrides, engine)
        yield ok("settings", f"of {conf_file or 'defaults, variables and --set'}: no mistakes")
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
        print("starting Spark ...", file=sys.stderr, flush=True)
        yield machine.spark_starts()
    if settings is not None:
        yield from _of_settings(settings, merchant, market)


def _of_settings(settings: Settings, merchant: str | None, market: str | None) -> Iterator[Check]:
    from featurekit_spark.doctor import services, storage
    from featurekit_spark.settings import RedisSinkSettings

    places = {"warehouse": settings.warehouse}
    if settings.cache.kind == "delta":
        places["cache"] = settings.cache_path
    for name, place in places.items():
        yield storage.writable(name, place)
    last = list(places.values())[-1]
    yield storage.several_writers("several writers", last)
    yield storage.disk("disk", last)
    for sink in settings.sinks:
        if isinstance(sink, RedisSinkSettings):
            yield services.redis_sink(sink)
    yield services.model(settings.llm, os.environ)
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
