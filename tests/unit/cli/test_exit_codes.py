"""Every error has its exit code."""

from __future__ import annotations

import pytest

from featurekit_spark import errors
from featurekit_spark.cli.exit_codes import ExitCode, exit_code

CODES = {
    "AnswersPendingError": 75,
    "BudgetError": 6,
    "BudgetReachedError": 75,
    "BuildError": 1,
    "CacheError": 3,
    "ConfigError": 3,
    "ContextError": 3,
    "CycleError": 3,
    "DataError": 4,
    "DefinitionError": 3,
    "FeaturekitError": 1,
    "LockedError": 75,
    "NewCallsError": 6,
    "NotBuiltError": 1,
    "PublishGateError": 4,
    "ServiceError": 75,
    "UnknownBuilderError": 3,
    "UsageError": 2,
    "ValueMismatchError": 4,
}


def test_the_table_is_whole() -> None:
    assert set(CODES) == {name for name in errors.__all__ if name.endswith("Error")}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_an_error_has_its_code(name: str, code: int) -> None:
    assert exit_code(getattr(errors, name)("what failed")) == code


def test_the_codes_are_the_documented_ones() -> None:
    assert [code.value for code in ExitCode] == [0, 1, 2, 3, 4, 5, 6, 75, 141]
    assert exit_code(ZeroDivisionError()) is ExitCode.BUG
