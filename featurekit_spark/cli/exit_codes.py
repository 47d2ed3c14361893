"""What a process says of a run when it ends."""

from __future__ import annotations

from enum import IntEnum

from featurekit_spark.errors import (
    BudgetError,
    BudgetReachedError,
    CacheError,
    ConfigError,
    ContextError,
    DataError,
    DefinitionError,
    FeaturekitError,
    UsageError,
    ValueMismatchError,
)

__all__ = ["ExitCode", "exit_code"]


class ExitCode(IntEnum):
    """Codes of every command and job."""

    OK = 0
    BUG = 1
    USAGE = 2
    CONFIG = 3
    DATA = 4
    PARTIAL = 5
    BUDGET = 6
    RETRY = 75
    READER_GONE = 141  # as a shell has it of what SIGPIPE ended


def exit_code(error: BaseException) -> ExitCode:
    """The code for an error that ended a run."""
    match error:
        case UsageError():
            return ExitCode.USAGE
        case ConfigError() | DefinitionError() | ContextError() | CacheError():
            return ExitCode.CONFIG
        case DataError() | ValueMismatchError():
            return ExitCode.DATA
        case BudgetReachedError():
            return ExitCode.RETRY
        case BudgetError():
            return ExitCode.BUDGET
        case FeaturekitError() if error.retryable:
            return ExitCode.RETRY
        case _:
            return ExitCode.BUG
