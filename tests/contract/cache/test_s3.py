"""A cache on an object store that only options open: everything that reads or writes it uses them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from featurekit_spark.cache.base import FeatureCache, RunRecord
from featurekit_spark.cache.delta import DeltaCache
from featurekit_spark.cache.gc import GcOptions, collect
from featurekit_spark.cache.journal import take_in
from featurekit_spark.cache.storage import storage_of
from featurekit_spark.cache.upkeep import compact, unused_files, vacuum
from featurekit_spark.cache.verify import verify
from featurekit_spark.doctor.base import Status
from featurekit_spark.doctor.storage import writable
from featurekit_spark.errors import CacheError
from featurekit_spark.session import Session
from featurekit_spark.testing.behaviour import NOON, CacheBehaviour, entry, pointer, rows
from tests import shop
from tests.contract.cache.test_staged import WrittenByWorkers
from tests.s3 import Store, s3_server

# One that pyarrow has no word for: then the storage is opened by deltalake.
UNKNOWN = {"AWS_REQUEST_PAYER": "false"}
LATER = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
def s3() -> Iterator[Store]:
    with s3_server() as store:
        yield store


@pytest.fixture(params=[{}, UNKNOWN], ids=["pyarrow", "deltalake"])
def cache(request: Any, s3: Store) -> DeltaCache:
    return DeltaCache("s3://lake/a b/cache", storage_options={**s3.options, **request.param})


class TestOnS3ByWorkers(CacheBehaviour):
    """The same, every entry by the way through a worker's file."""

    test_many_keys_at_once: Any = None  # as on a disk, and long

    @pytest.fixture(autouse=True)
    def _server(self, s3: Store) -> None:
        self.s3 = s3

    def make_cache(self, folder: Path) -> FeatureCache:
        return WrittenByWorkers(f"s3://lake/{folder.name}", storage_options=self.s3.options)


class TestOnS3(CacheBehaviour):
    """The whole contract, over HTTP."""

    @pytest.fixture(autouse=True)
    def _server(self, s3: Store) -> None:
        self.s3 = s3

    def make_cache(self, folder: Path) -> FeatureCache:
        return DeltaCache(f"s3://lake/{folder.name}", storage_options=self.s3.options)


def test_care_uses_the_options(cache: DeltaCache) -> None:
    old, new = entry("a", "A"), entry("a", "B", inputs="i2")
    cache.append(rows(old), [pointer(old)])
    cache.append(rows(new, entry("b", "x")))
    facts = {"Title": {"type": "string", "config_hash": "c1"}}
    cache.record_run(RunRecord("r1", '["abt"]', NOON, "ok", {"builders": facts}))
    cache.put_mark("m", {"a": 1})
    assert cache.mark("m") == {"a": 1}
    found = verify(cache)
    assert (found.rows, found.values, found.damage) == (3, 3, ())
    report = collect(cache, GcOptions(older_than=timedelta(0), include_paid=True), now=LATER)
    assert (report["rows"], cache.mark("m")) == (1, None)
    assert len(cache.history("Title")) == 2
    cache.append(rows(entry("c", "y")))
    assert (compact(cache, "entries")["files"], vacuum(cache, "entries", hours=0)) == (1, 3)
    assert unused_files(cache, "entries", now=LATER, remove=False) == []
    assert len(pickle.loads(pickle.dumps(cache)).history("Title")) == 3


def test_a_run_and_the_next_one(cache: DeltaCache) -> None:
    world = shop.World(products={("abt", "US", name): shop.Product(name) for name in ("p1", "p2")})
    session = Session(shop.ShopContext(world), cache, engine="local")
    first = session.run(shop.Prompt.over(shop.ProductIds), merchant="abt", market="US")
    assert (first.status, first.builders["Prompt"].computed) == ("ok", 2)
    assert session.run(shop.Prompt.over(shop.ProductIds), merchant="abt", market="US").unchanged


def test_workers_stage_entries(cache: DeltaCache) -> None:
    staging = cache.staging("run-1")
    assert staging is not None
    away = pickle.loads(pickle.dumps(staging))
    writer = away.writer()
    assert away.handed_over(staging.hand_over(b"inputs")) == b"inputs"
    for start in (entry("a", "lamp"), entry("b", "sofa", builder="B"), entry("c", None)):
        writer.add(rows(start))
    files = writer.close()
    staging.close()
    assert away.writer() is None and len(cache.history("Title")) == 0
    cache.append_staged(files)
    assert sorted(cache.history("Title")["key"].to_pylist()) == ['["a"]', '["c"]']
    assert sum(len(staging.read(file)) for file in files) == 3


@pytest.mark.parametrize("more", [{}, UNKNOWN], ids=["pyarrow", "deltalake"])
def test_other_credentials_open_nothing(s3: Store, more: dict[str, str]) -> None:
    one = entry("a", "A")
    DeltaCache("s3://lake/cache", storage_options=s3.options).append(rows(one))
    wrong = {**s3.options, "AWS_SECRET_ACCESS_KEY": "guessed", **more}
    with pytest.raises(CacheError):
        DeltaCache("s3://lake/cache", storage_options=wrong).find("Title", "c1", {one.key: one.entry_id})
    storage = storage_of("s3://lake/cache", wrong)
    with pytest.raises(OSError, match=r"(?i)403|denied|forbidden"):
        storage.get_file_info("entries/_delta_log/00000000000000000000.json")


def test_options_are_taken_by_any_of_their_names(s3: Store) -> None:
    DeltaCache("s3://lake/cache", storage_options=s3.options).append(rows(entry("a", "A")))
    names = {
        "access_key_id": s3.access_key,
        "AWS_SECRET_ACCESS_KEY": s3.secret_key,
        "aws_default_region": s3.region,
        "endpoint": s3.url,
        "aws_virtual_hosted_style_request": "false",
        "timeout": "30s",
        "allow_http": "1",
    }
    storage = storage_of("s3a://lake/cache/entries", names)
    assert type(storage.base_fs).__name__ == "S3FileSystem"
    assert storage.get_file_info("_delta_log/00000000000000000000.json").is_file


def test_what_is_named_in_the_environment_opens_it_as_well(s3: Store, monkeypatch: Any) -> None:
    """As `deltalake` takes it from there."""
    for name, value in s3.options.items():
        monkeypatch.setenv(name, value)
    cache = DeltaCache("s3://lake/cache")
    cache.append(rows(entry("a", "A")))
    cache.put_mark("m", {"a": 1})
    assert len(cache.history("Title")) == 1 and cache.mark("m") == {"a": 1}
    staging, journal = cache.staging("run-1"), cache.journal("run-1", size=1)
    assert staging is not None and staging.writer() is not None
    with journal.opened():
        journal.add(rows(entry("b", "B")))
        assert take_in(cache) == 1
    assert type(storage_of("s3a://lake/cache", {"timeout": "30s"}).base_fs).__name__ == "S3FileSystem"


def test_doctor_tries_it_with_the_options(s3: Store, monkeypatch: Any) -> None:
    assert writable("cache", "s3://lake/cache", s3.options).status is Status.OK
    wrong = writable("cache", "s3://lake/cache", {**s3.options, "AWS_SECRET_ACCESS_KEY": "hunter2"})
    assert wrong.status is Status.FAIL and "hunter2" not in wrong.found
    monkeypatch.delenv("LAKE_SECRET", raising=False)
    missing = writable(
        "cache", "s3://lake/cache", {**s3.options, "AWS_SECRET_ACCESS_KEY": "${env:LAKE_SECRET}"}
    )
    assert missing.status is Status.FAIL and "'LAKE_SECRET'" in missing.found


def test_on_a_disk_options_say_nothing(tmp_path: Path) -> None:
    cache = DeltaCache(str(tmp_path), storage_options={"AWS_ACCESS_KEY_ID": "x"})
    cache.append(rows(entry("a", "A")))
    assert len(cache.history("Title")) == 1
