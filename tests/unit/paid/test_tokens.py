"""Tokens are counted by the vocabularies that are installed, with no network, or estimated and labelled so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurekit_spark.paid.tokens import TokenCount, count_request, count_tokens


@pytest.mark.parametrize(
    ("model", "text", "count"),
    [
        ("gpt-4o-mini", "hello world", 2),
        ("gpt-4o", "antidisestablishmentarianism", 6),
        ("gpt-4", "antidisestablishmentarianism", 6),
        ("gpt-4", "2 + 2 = 4", 7),
        ("openai/gpt-4o-mini", "hello world", 2),
        ("text-embedding-3-small", "tiktoken is great!", 6),
        ("gpt-4o-mini", "", 0),
        ("gpt-4o-mini", "<|endoftext|>", 7),  # a text, not the end of one
    ],
)
def test_known_models_count_by_their_vocabulary(model: str, text: str, count: int) -> None:
    assert count_tokens(text, model) == TokenCount(count, estimated=False)


def test_a_chat_request_is_its_texts_and_what_frames_them() -> None:
    assert count_request("hello world", None, "gpt-4o-mini") == TokenCount(2 + 3 + 3, estimated=False)
    assert count_request("hello world", "hello", "gpt-4o-mini") == TokenCount(
        2 + 3 + 1 + 3 + 3, estimated=False
    )


def test_other_models_are_estimated_and_say_so() -> None:
    assert count_tokens("a" * 41, "llama-3") == TokenCount(11, estimated=True)
    assert count_tokens("\u6c34" * 8, "llama-3") == TokenCount(6, estimated=True)
    assert count_request("a", None, "llama-3").estimated


def test_an_endless_word_takes_no_time() -> None:
    assert count_tokens("a" * 300_000, "gpt-4o-mini").count > 10_000
    assert count_tokens("\ud800", "gpt-4o-mini").count > 0  # half of a pair


@given(st.text(max_size=200), st.text(max_size=200))
def test_more_text_is_not_fewer_tokens_by_far(one: str, other: str) -> None:
    for model in ("gpt-4o-mini", "llama-3"):
        both = count_tokens(one + other, model).count
        apart = count_tokens(one, model).count + count_tokens(other, model).count
        assert 0 <= both <= apart + 8


def test_nothing_is_fetched_and_the_environment_stays_as_it_was() -> None:
    code = (
        "import os, socket\n"
        "def refuse(*arguments, **named): raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from featurekit_spark.paid.tokens import count_tokens\n"
        "print(count_tokens('hello world', 'gpt-4o'), count_tokens('hello world', 'gpt-4'))\n"
        "print('TIKTOKEN_CACHE_DIR' in os.environ)\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "TIKTOKEN_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "TokenCount(count=2, estimated=False) TokenCount(count=2, estimated=False)",
        "False",
    ]


def test_without_the_packages_everything_is_estimated() -> None:
    code = (
        "import sys\n"
        "sys.modules['tiktoken'] = None\n"
        "from featurekit_spark.paid.tokens import count_tokens\n"
        "print(count_tokens('hello world', 'gpt-4o'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "TokenCount(count=3, estimated=True)"
