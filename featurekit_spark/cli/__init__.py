"""The `featurekit` command, and the mains that jobs call. Exit codes and printing live nowhere else."""

from featurekit_spark.cli.main import app, run_logic_main

__all__ = ["app", "run_logic_main"]
