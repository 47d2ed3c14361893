"""The publish gate: a result that shrank too much does not replace the one that is published.

Owns the comparison and its message. It must not know where results are published.
"""

from __future__ import annotations

from featurekit_spark.errors import PublishGateError
from featurekit_spark.sinks.base import PublishedState

__all__ = ["check_gate"]

# Shares are written as decimals: 0.3 of 10 rows must be 3, not 2.9999999999999996.
_ROUNDING = 1e-9


def check_gate(
    previous: PublishedState | None,
    rows: int,
    covered: int,
    *,
    max_row_drop: float | None,
    max_coverage_drop: float | None,
) -> None:
    """PublishGateError if rows, or the share of rows with recs, fell by more than the given share of before.

    `max_row_drop=0.5` lets the rows halve and no more; coverage is `covered / rows` and compared likewise.
    None turns a check off. A first publication always passes.
    """
    if previous is None or previous.rows == 0:
        return
    row_drop = 1 - rows / previous.rows
    if max_row_drop is not None and row_drop > max_row_drop + _ROUNDING:
        raise PublishGateError(
            f"Not published: {rows} rows now, {previous.rows} published by run {previous.run_id!r}, "
            f"{row_drop:.1%} fewer than the {max_row_drop:.1%} that may go. {_remedy('max_row_drop')}"
        )
    before = previous.covered / previous.rows
    now = covered / rows if rows else 0.0
    coverage_drop = 1 - now / before if before else 0.0
    if max_coverage_drop is not None and coverage_drop > max_coverage_drop + _ROUNDING:
        raise PublishGateError(
            f"Not published: {now:.1%} of the rows have recommendations now, {before:.1%} in run "
            f"{previous.run_id!r}, a fall by {coverage_drop:.1%} where {max_coverage_drop:.1%} is allowed. "
            f"{_remedy('max_coverage_drop')}"
        )


def _remedy(key: str) -> str:
    return (
        f"Look at the catalog and the run's errors; if the result is right, run again with "
        f"--set publish_gate.{key}=null (nothing computed is lost)."
    )
