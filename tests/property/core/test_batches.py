"""Keys that come from Spark partition by partition are called for in full batches."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.engines.table_here import batches_of


@given(sizes=st.lists(st.integers(0, 12)), rows=st.integers(1, 9))
def test_full_batches_in_order(sizes: list[int], rows: int) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    tables = [
        pa.table({"key": pa.array(range(start, start + size), pa.int64())})
        for start, size in zip(starts, sizes, strict=True)
    ]
    found = list(batches_of(tables, rows))
    assert [key for table in found for key in table["key"].to_pylist()] == list(range(sum(sizes)))
    assert all(len(table) == rows for table in found[:-1])
    assert all(0 < len(table) <= rows for table in found)
    assert all(len(table.to_batches()) == 1 for table in found)
