"""Clients see whose call they are asked in, however a builder asks."""

from __future__ import annotations

import asyncio
from typing import Any

import pyarrow as pa

from featurekit_spark import aio
from featurekit_spark.asking import Asking, asking_now
from featurekit_spark.build import build_values
from featurekit_spark.builder import FeatureBuilder, bind


class Client:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, Asking | None]] = []

    async def ask(self, what: str) -> str:
        await asyncio.sleep(0)
        self.seen.append((what, asking_now()))
        if what == "bad":
            raise ValueError(what)
        return what


class World:
    def __init__(self) -> None:
        self.client = Client()


class AtOnce(FeatureBuilder[str]):
    key, value, needs = ("a", "b"), pa.string(), ("client",)

    async def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return "".join(await asyncio.gather(*(context.client.ask(inputs[name]) for name in ("a", "b"))))


class InTurn(FeatureBuilder[str]):
    key, value, needs = ("a", "b"), pa.string(), ("client",)

    def build_one(self, inputs: Any, config: Any, context: Any) -> str:
        return "".join(aio.run(context.client.ask(inputs[name])) for name in ("a", "b"))


def test_a_clients_calls_belong_to_a_key_and_know_how_it_ended() -> None:
    for builder in (AtOnce, InTurn):
        world = World()
        build_values(bind(builder, world), {"a": ["x", "y"], "b": ["z", "bad"]}, world)
        askers = dict(world.client.seen)
        assert {what: asker.key for what, asker in askers.items() if asker is not None} == {
            "x": ("x", "z"),
            "z": ("x", "z"),
            "y": ("y", "bad"),
            "bad": ("y", "bad"),
        }
        assert askers["x"] is askers["z"] and askers["y"] is askers["bad"]
        assert {asker.builder for asker in askers.values() if asker is not None} == {builder.name}
        assert askers["x"] is not None and askers["x"].error is None
        assert askers["y"] is not None and isinstance(askers["y"].error, ValueError)
    assert asking_now() is None
