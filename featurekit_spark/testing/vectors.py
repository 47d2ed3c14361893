"""What every vector index promises, as a test class: subclass it beside your implementation and pytest runs all of it.

Knows the protocol in `search/index.py` and no implementation. Needs pytest only as the thing that collects it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from featurekit_spark.errors import ConfigError, DataError, UsageError
from featurekit_spark.search.export import export_vectors
from featurekit_spark.search.filters import And, Equals, Filter, In, Range, matches
from featurekit_spark.search.index import IndexSpec, Row, VectorIndex, checked_rows
from featurekit_spark.testing.vector_samples import (
    DIM,
    FILTERS,
    ODD_IDS,
    SPEC,
    assert_as_reference,
    assert_raises,
    sample,
)

__all__ = ["VectorIndexBehaviour"]


class VectorIndexBehaviour:
    """Subclass it as `TestMyIndex` and give `make_index`; `opening` as well where rows outlive the process.

    `tolerance` is by how much scores may differ from the reference: 0, or the rounding of a store that keeps vectors
    normalised. `refused`: filters that the store cannot do. Indexes that miss neighbours cannot pass.
    """

    durable: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.0
    refused: ClassVar[tuple[Filter, ...]] = ()

    def make_index(self, folder: Path, spec: IndexSpec | None = SPEC) -> VectorIndex:
        """The index kept in `folder`, which exists; called again for the same folder, it is opened anew."""
        raise UsageError(f"{type(self).__name__} defines no make_index(folder, spec)")

    def opening(self, folder: Path) -> str:
        """Python statements that make the same index in another process: `index` of `spec`."""
        raise UsageError(f"{type(self).__name__} defines no opening(folder)")

    # -- what is there ---------------------------------------------------------------------------------------

    def test_it_is_an_index(self, tmp_path: Path) -> None:
        index = self.make_index(tmp_path)
        assert isinstance(index, VectorIndex)
        assert index.spec == SPEC
        index.close()
        index.close()

    def test_an_empty_index_answers_nothing(self, tmp_path: Path) -> None:
        index = self.make_index(tmp_path)
        assert index.describe() is None
        assert index.count() == index.count(Equals("brand", "LG")) == 0
        assert index.search(np.ones((2, DIM)), 3) == [[], []]
        assert index.search(np.empty((0, DIM)), 3) == []
        assert index.delete(["a"]) == 0
        assert list(index.hashes()) == []
        index.upsert([], np.empty((0, DIM)))
        assert index.search(np.ones((1, DIM)), 3, filter=Equals("New", True)) == [[]]
        index.close()

    def test_rows_come_back_as_they_were_given(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(30)
        assert index.upsert(ids, vectors, payloads).sent == 30
        assert index.count() == 30
        hits = {hit.id: hit for hit in index.search(vectors[:1], 30)[0]}
        assert {name: hit.payload for name, hit in hits.items()} == dict(zip(ids, payloads, strict=True))
        assert {type(hit.payload["price"]) for hit in hits.values()} == {float, type(None)}
        state = index.describe()
        assert state is not None
        assert (state.rows, state.spec, state.content) == (30, SPEC, None)
        index.close()

    def test_a_payload_may_lack_fields_or_all(self, tmp_path: Path) -> None:
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(3)
        index.upsert(ids[:1], vectors[:1])
        index.upsert(ids[1:], vectors[1:], [{"brand": "LG"}, {}])
        nothing = dict.fromkeys(SPEC.fields)
        found = {hit.id: hit.payload for hit in index.search(vectors[:1], 3)[0]}
        assert found == {ids[0]: nothing, ids[1]: {**nothing, "brand": "LG"}, ids[2]: nothing}
        index.close()

    def test_ids_and_texts_are_any_unicode(self, tmp_path: Path) -> None:
        index, (_, vectors, _) = self.make_index(tmp_path), sample(len(ODD_IDS))
        payloads = [{"brand": name} for name in ODD_IDS]
        index.upsert(ODD_IDS, vectors, payloads)
        assert {name for name, _ in index.hashes()} == set(ODD_IDS)
        for name, vector in zip(ODD_IDS, vectors, strict=True):
            (found,) = index.search(vector[None], 1, filter=Equals("brand", name))
            assert [(hit.id, hit.payload["brand"]) for hit in found] == [(name, name)]
            assert index.count(In("brand", [name, "other"])) == 1
        assert index.delete(ODD_IDS[:6]) == 6
        assert {name for name, _ in index.hashes()} == set(ODD_IDS[6:])
        index.close()

    # -- search ----------------------------------------------------------------------------------------------

    def test_the_nearest_come_first(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(300)
        index.upsert(ids, vectors, payloads)
        queries = sample(20, seed=1)[1]
        self._check(index.search(queries, 10), ids, vectors, queries, 10)
        index.close()

    def test_by_cosine_lengths_do_not_count(self, tmp_path: Path) -> None:
        spec = IndexSpec(DIM, "cosine")
        index, (ids, vectors, _) = self.make_index(tmp_path, spec), sample(200)
        scaled = (vectors * np.geomspace(0.01, 100, 200)[:, None]).astype(np.float32)
        queries = (sample(5, seed=1)[1] * 7).astype(np.float32)
        index.upsert(ids, scaled)
        self._check(index.search(queries, 10), ids, scaled, queries, 10, cosine=True)
        index.close()

    def test_by_inner_product_lengths_count(self, tmp_path: Path) -> None:
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(50)
        index.upsert(ids, vectors * np.linspace(0.5, 3, 50, dtype=np.float32)[:, None])
        scaled = vectors * np.linspace(0.5, 3, 50, dtype=np.float32)[:, None]
        self._check(index.search(vectors[:4], 7), ids, scaled, vectors[:4], 7)
        index.close()

    def test_equal_scores_go_by_id(self, tmp_path: Path) -> None:
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(120)
        shuffled = [ids[place] for place in np.random.default_rng(3).permutation(120)]
        tied = np.repeat(vectors[:2], 60, axis=0)
        index.upsert(shuffled, tied)
        for query, own in ((vectors[:1], shuffled[:60]), (vectors[1:2], shuffled[60:])):
            (found,) = index.search(query, 10)
            assert [hit.id for hit in found] == sorted(own)[:10]
            assert len({hit.score for hit in found}) == 1
        index.close()

    def test_k_may_be_more_than_there_is(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(12)
        index.upsert(ids, vectors, payloads)
        for k in (12, 13, 1000, 10_000_000):
            assert sorted(hit.id for hit in index.search(vectors[:1], k)[0]) == ids
        assert len(index.search(vectors[:1], 1000, filter=Equals("brand", "LG"))[0]) == 2
        index.close()

    def test_rows_are_left_out_by_id(self, tmp_path: Path) -> None:
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(40)
        index.upsert(ids, vectors)
        full = index.search(vectors[:3], 40)
        exclude = [[ids[0]], [hit.id for hit in full[1][:30]], ["nobody"]]
        found = index.search(vectors[:3], 10, exclude=exclude)
        for hits, all_hits, names in zip(found, full, exclude, strict=True):
            assert hits == [hit for hit in all_hits if hit.id not in names][:10]
        index.close()

    def test_a_search_finds_only_what_meets_the_filter(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(90)
        index.upsert(ids, vectors, payloads)
        for wanted in FILTERS:
            kept = [place for place, payload in enumerate(payloads) if matches(wanted, payload)]
            assert index.count(wanted) == len(kept), wanted
            found = index.search(vectors[:3], 90, filter=wanted)
            own = [ids[place] for place in kept]
            self._check(found, own, vectors[kept], vectors[:3], 90, told=wanted)
        index.close()

    def test_a_filter_that_cannot_be_done_is_refused(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(5)
        wrong: list[Any] = [
            Equals("colour", "red"), Equals("stock", "3"), Equals("stock", 2.0), Equals("stock", True),
            Equals("brand", 3), Equals("New", 1), Equals("price", float("nan")), Equals("stock", 2**60),
            In("brand", ["LG", 3]), Range("New", gt=False), Range("price"), And(Equals("brand", "x"), Range("stock")),
            "brand = 'LG'", Equals("brand", "\ud800"), *self.refused,
        ]  # fmt: skip
        for filled in (False, True):
            if filled:
                index.upsert(ids, vectors, payloads)
            for wanted in wrong:
                for ask in (lambda w: index.search(vectors[:1], 3, filter=w), index.count):
                    assert_raises(UsageError, ask, wanted)
        index.close()

    # -- refusals --------------------------------------------------------------------------------------------

    def test_wrong_shapes_are_refused(self, tmp_path: Path) -> None:
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(3)
        wrong_dim = np.ones((3, DIM + 1))
        assert_raises(UsageError, index.upsert, ids, wrong_dim, told=(str(DIM + 1), str(DIM)))
        assert_raises(UsageError, index.upsert, ids[:2], vectors)
        assert_raises(UsageError, index.upsert, ids, vectors, [{}])
        assert_raises(
            UsageError, index.upsert, ids, vectors, [{"colour": "red"}, {}, {}], told=("colour", "p-00000")
        )
        assert_raises(
            UsageError, index.upsert, ids, vectors, [{"stock": 1.5}, {}, {}], told=("stock", "p-00000")
        )
        assert_raises(
            UsageError, index.upsert, ids, vectors, [{}, {"price": float("inf")}, {}], told=("price",)
        )
        assert_raises(UsageError, index.upsert, ["", "b", "c"], vectors)
        assert_raises(DataError, index.upsert, ["a", "b", "a"], vectors, told=("'a'",))
        assert_raises(UsageError, index.search, wrong_dim, 3)
        assert_raises(UsageError, index.search, vectors, 0)
        assert_raises(UsageError, lambda: index.search(vectors, 3, exclude=[["a"]]))
        assert index.count() == 0
        index.close()

    def test_vectors_that_cannot_be_searched_are_refused_by_id(self, tmp_path: Path) -> None:
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(6)
        for value in (np.nan, np.inf, -np.inf):
            bad = vectors.copy()
            bad[2, 1] = bad[4, 0] = value
            assert_raises(DataError, index.upsert, ids, bad, told=("p-00002", "p-00004"))
            assert_raises(DataError, index.search, bad, 3, told=("query 2",))
        bad = vectors.copy()
        bad[5] = 0
        assert_raises(DataError, index.upsert, ids, bad, told=("p-00005",))
        assert_raises(DataError, export_vectors, index, ids, bad, told=("p-00005",))
        assert index.count() == 0
        assert index.describe() is None
        index.close()

    # -- changes ---------------------------------------------------------------------------------------------

    def test_rows_that_are_there_are_not_sent(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(50)
        index.upsert(ids, vectors, payloads)
        again = index.upsert(ids, vectors, payloads)
        assert (again.sent, again.same, index.count()) == (0, 50, 50)
        moved, renamed = vectors.copy(), [dict(payload) for payload in payloads]
        moved[3] = vectors[4]
        renamed[7]["brand"] = "Acme"
        changed = index.upsert(ids, moved, renamed)
        assert (changed.sent, changed.same, index.count()) == (2, 48, 50)
        assert [hit.id for hit in index.search(vectors[4:5], 2)[0]] == [ids[3], ids[4]]
        assert [hit.id for hit in index.search(vectors[:1], 9, filter=Equals("brand", "Acme"))[0]] == [ids[7]]
        index.close()

    def test_what_is_deleted_is_not_found(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(20)
        index.upsert(ids, vectors, payloads)
        assert index.delete([*ids[:5], ids[0], "nobody"]) == 5
        assert index.delete(ids[:5]) == 0
        assert sorted(hit.id for hit in index.search(vectors[:1], 50)[0]) == ids[5:]
        assert index.count() == 15
        assert index.upsert(ids[:1], vectors[:1], payloads[:1]).sent == 1
        assert index.search(vectors[:1], 1)[0][0].id == ids[0]
        index.close()

    def test_it_is_there_when_opened_anew(self, tmp_path: Path) -> None:
        if not self.durable:
            return
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(20)
        index.upsert(ids, vectors, payloads)
        before = index.search(vectors, 5, filter=Equals("brand", "LG"))
        index.close()
        for spec in (SPEC, None):
            index = self.make_index(tmp_path, spec)
            assert index.spec == SPEC
            assert index.search(vectors, 5, filter=Equals("brand", "LG")) == before
            assert index.upsert(ids, vectors, payloads).same == 20
            index.close()

    def test_an_index_made_for_something_else_is_not_searched(self, tmp_path: Path) -> None:
        if not self.durable:
            return
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(5)
        index.upsert(ids, vectors)
        index.close()
        others = (
            IndexSpec(DIM + 1, "ip", SPEC.fields, SPEC.source),
            IndexSpec(DIM, "cosine", SPEC.fields, SPEC.source),
            IndexSpec(DIM, "ip", {"brand": "str"}, SPEC.source),
            IndexSpec(DIM, "ip", SPEC.fields, "another embedder"),
        )
        for spec in others:
            other, queries = self.make_index(tmp_path, spec), sample(2, dim=spec.dim)[1]
            assert_raises(ConfigError, other.search, queries, 3)
            assert_raises(ConfigError, other.upsert, ids[:2], queries)
            other.close()
        other = self.make_index(tmp_path, others[0])
        assert export_vectors(other, ids[:2], sample(2, dim=DIM + 1)[1]).how == "replaced"
        assert len(other.search(sample(1, dim=DIM + 1)[1], 9)[0]) == 2
        other.close()

    # -- generations -----------------------------------------------------------------------------------------

    def test_a_switch_shows_a_search_the_old_whole_or_the_new_whole(self, tmp_path: Path) -> None:
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(60)
        versions = [{"brand": f"v{number}"} for number in range(4)]
        export_vectors(index, ids, vectors, [versions[0]] * 60)
        seen: list[set[str]] = []
        failed: list[BaseException] = []
        done = threading.Event()

        def search() -> None:
            try:
                while not done.is_set():
                    found = index.search(vectors[:2], 60)
                    assert [len(hits) for hits in found] == [60, 60]
                    seen.append({hit.payload["brand"] for hits in found for hit in hits})
            except BaseException as error:
                failed.append(error)

        reader = threading.Thread(target=search)
        reader.start()
        try:
            for version in versions[1:]:
                export_vectors(index, ids, vectors, [version] * 60, batch=7)
                enough = len(seen) + 2  # one may have begun before the switch
                while len(seen) < enough and not failed:
                    done.wait(0.01)
        finally:
            done.set()
            reader.join()
        if failed:
            raise failed[0]
        assert all(len(brands) == 1 for brands in seen)
        assert seen[-1] == {"v3"}
        index.close()

    def test_an_export_that_fails_halfway_changes_nothing(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(30)
        export_vectors(index, ids, vectors, payloads)
        before, state = index.search(vectors[:5], 30), index.describe()

        def broken() -> Iterator[Sequence[Row]]:
            yield checked_rows(SPEC, ["new-1", "new-2"], vectors[:2], None)
            raise RuntimeError("the source broke")

        assert_raises(RuntimeError, index.replace, broken(), "c" * 32)
        twice = checked_rows(SPEC, ["same"], vectors[:1], None)
        assert_raises(DataError, index.replace, [twice, twice], "d" * 32, told=("same",))
        assert index.search(vectors[:5], 30) == before
        assert index.describe() == state
        assert export_vectors(index, ids, vectors, payloads).how == "unchanged"
        index.close()

    def test_an_export_sends_what_differs(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(100)
        first = export_vectors(index, ids, vectors, payloads, batch=30)
        assert (first.how, first.rows, first.sent, first.removed) == ("replaced", 100, 100, 0)
        again = export_vectors(index, ids, vectors, payloads)
        assert (again.how, again.sent, again.same, again.content) == ("unchanged", 0, 100, first.content)
        backwards = export_vectors(index, ids[::-1], vectors[::-1], payloads[::-1])
        assert backwards.how == "unchanged"

        moved = vectors[5:].copy()
        moved[0] = vectors[50]
        some = export_vectors(index, ids[5:], moved, payloads[5:], batch=30)
        assert (some.how, some.rows, some.sent, some.same, some.removed) == ("changed", 95, 1, 94, 5)
        assert some.generation == first.generation
        assert some.content != first.content
        state = index.describe()
        assert state is not None
        assert (state.rows, state.content) == (95, some.content)
        self._check(index.search(vectors[:5], 20), ids[5:], moved, vectors[:5], 20)

        back = export_vectors(index, ids, vectors, payloads)  # five new rows and one that moved back
        assert (back.how, back.sent, back.content) == ("changed", 6, first.content)
        most = export_vectors(index, ids[:50], vectors[:50], payloads[:50])
        assert (most.how, most.sent, index.count()) == ("replaced", 50, 50)
        assert most.generation != first.generation
        whole = export_vectors(index, ids, vectors, payloads)
        assert (whole.how, index.count(), whole.content) == ("replaced", 100, first.content)
        assert whole.sent == 0  # the generation before still had them
        self._check(index.search(vectors[:5], 20), ids, vectors, vectors[:5], 20)
        empty = export_vectors(index, [], np.empty((0, DIM)))
        assert (empty.how, empty.rows, index.count()) == ("replaced", 0, 0)
        index.close()

    def test_the_generation_before_may_be_taken_up_again(self, tmp_path: Path) -> None:
        """Whatever became of its rows since."""
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(40)
        first = export_vectors(index, ids[:36], vectors[:36], payloads[:36])
        assert export_vectors(index, ids[2:], vectors[2:], payloads[2:]).how == "changed"
        index.upsert(ids[5:6], vectors[:1], payloads[5:6])
        assert export_vectors(index, ids[:9], vectors[:9], payloads[:9]).how == "replaced"
        back = export_vectors(index, ids[:36], vectors[:36], payloads[:36])
        assert (back.how, back.rows, back.content) == ("replaced", 36, first.content)
        assert {name for name, _ in index.hashes()} == set(ids[:36])
        self._check(index.search(vectors[:5], 40), ids[:36], vectors[:36], vectors[:5], 40)
        index.close()

    def test_a_dry_export_sends_nothing(self, tmp_path: Path) -> None:
        index, (ids, vectors, _) = self.make_index(tmp_path), sample(20)
        told = export_vectors(index, ids, vectors, dry_run=True)
        assert (told.how, told.sent, index.describe()) == ("replaced", 20, None)
        export_vectors(index, ids, vectors)
        told = export_vectors(index, ids[1:], vectors[1:], dry_run=True)
        assert (told.how, told.sent, told.removed, index.count()) == ("changed", 0, 1, 20)
        index.close()

    def test_single_changes_take_the_content_away(self, tmp_path: Path) -> None:
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(20)
        made = export_vectors(index, ids, vectors, payloads)
        index.upsert(ids, vectors, payloads)
        state = index.describe()
        assert state is not None
        assert state.content == made.content  # nothing was sent
        index.upsert(ids[:1], vectors[1:2], payloads[:1])
        state = index.describe()
        assert state is not None
        assert state.content is None
        mended = export_vectors(index, ids, vectors, payloads)
        assert (mended.how, mended.sent, mended.content) == ("changed", 1, made.content)
        index.close()

    def test_an_export_that_is_killed_leaves_the_old_and_goes_on(self, tmp_path: Path) -> None:
        """A process is killed with -9 while it writes a new generation, and another while it changes rows in place."""
        if not self.durable:
            return
        index, (ids, vectors, payloads) = self.make_index(tmp_path), sample(200)
        old = [{"brand": "old"}] * 200
        made = export_vectors(index, ids, vectors, old)
        before = index.search(vectors[:3], 200)
        index.close()

        self._killed(tmp_path, in_place=0.0)
        index = self.make_index(tmp_path)
        state = index.describe()
        assert state is not None
        assert (state.content, state.rows) == (made.content, 200)
        assert index.search(vectors[:3], 200) == before
        resumed = export_vectors(index, ids, vectors, payloads, in_place=0.0)
        assert (resumed.how, resumed.rows) == ("replaced", 200)
        assert (resumed.sent, resumed.same) == (120, 80)  # four batches of 20 had gone
        assert index.count() == 200
        self._check(index.search(vectors[:3], 20), ids, vectors, vectors[:3], 20)
        export_vectors(index, ids, vectors, old)
        index.close()

        self._killed(tmp_path, in_place=1.0)
        index = self.make_index(tmp_path)
        state = index.describe()
        assert state is not None
        assert (state.content, state.rows) == (None, 200)
        brands = {hit.id: hit.payload["brand"] for hit in index.search(vectors[:1], 200)[0]}
        assert sum(brand == "old" for brand in brands.values()) == 120
        mended = export_vectors(index, ids, vectors, payloads, in_place=1.0)
        assert (mended.how, mended.sent, mended.content) == ("changed", 120, resumed.content)
        index.close()

    # -- help ------------------------------------------------------------------------------------------------

    def _killed(self, folder: Path, *, in_place: float) -> None:
        """Another process exports the sample, and is killed when the fifth batch of 20 rows is to be sent."""
        program = f"""
import os, signal
from featurekit_spark.search.export import export_vectors
from featurekit_spark.testing.vector_samples import SPEC, sample

spec = SPEC
{self.opening(folder)}

class Killed:
    def __init__(self, rows):
        self.rows, self.asked = rows, 0
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, part):
        self.asked += 1
        if self.asked == 15:  # ten to compare, and the fifth to send
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[part]

ids, vectors, payloads = sample(200)
export_vectors(index, ids, vectors, Killed(payloads), batch=20, in_place={in_place})
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == -9, (done.returncode, done.stdout, done.stderr)

    def _check(self, *given: Any, **more: Any) -> None:
        assert_as_reference(*given, tolerance=self.tolerance, **more)
