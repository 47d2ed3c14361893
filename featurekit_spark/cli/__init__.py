"""The `featurekit` command, and the mains that jobs call. Exit codes and printing live here and nowhere below."""

from featurekit_spark.cli.main import app, run_logic_main

__all__ = ["app", "run_logic_main"]
