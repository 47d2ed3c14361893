"""What is masked is gone, whatever stands around it; what is not is left as it was."""

from __future__ import annotations

import json
import string

from hypothesis import assume, example, given
from hypothesis import strategies as st

from featurekit_spark.paid.masking import MarkedFields, Masking
from featurekit_spark.paid.tracing import is_sampled

WORDS = st.text(st.sampled_from("abcxyz ABÄß日本.,;!?\n"), max_size=40)
NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=12)
EMAILS = st.builds(lambda name, host: f"{name}@{host}.example", NAMES, NAMES)
SECRETS = st.one_of(
    st.text(string.ascii_letters + string.digits, min_size=20, max_size=40).map("sk-{}".format),
    st.text(string.hexdigits, min_size=32, max_size=32).map("dapi{}".format),
    st.text(string.ascii_letters + string.digits, min_size=8, max_size=30).map("Bearer {}".format),
)
PHONES = st.builds(
    lambda plus, groups, between: plus + between.join(groups),
    st.sampled_from(["", "+"]),
    st.lists(st.text(string.digits, min_size=2, max_size=4), min_size=4, max_size=4),
    st.sampled_from(["", " ", "-", "/", "."]),
)


@given(WORDS, EMAILS, WORDS)
def test_no_address_is_left(before: str, email: str, after: str) -> None:
    shown = Masking().text(f"{before} {email} {after}")
    assert email not in shown and "[email]" in shown
    assert Masking(contacts=False).text(f"{before} {email} {after}") == f"{before} {email} {after}"


@given(WORDS, PHONES, WORDS)
def test_no_telephone_number_is_left(before: str, phone: str, after: str) -> None:
    assert phone not in Masking().text(f"{before} {phone} {after}")


@given(WORDS, SECRETS, WORDS)
def test_no_secret_is_left(before: str, secret: str, after: str) -> None:
    shown = Masking().text(f"{before} {secret} {after}")
    assert secret.split()[-1] not in shown
    known = Masking(secrets=(secret,)).text(f"{before}{secret}{after}")
    assert secret not in known


@given(st.text(st.sampled_from("ab .,!?\n123"), max_size=80))
def test_plain_text_stays_as_it_is(text: str) -> None:
    assume(not any(len("".join(c for c in part if c.isdigit())) > 7 for part in text.split("a")))
    assert Masking().text(text) == text


@given(st.text(max_size=200))
def test_any_text_can_be_masked_twice(text: str) -> None:
    once = Masking().text(text)
    assert Masking().text(once) == once


@given(WORDS, WORDS)
@example("{", "}")
def test_a_marked_field_is_not_in_prompt_or_answer(name: str, story: str) -> None:
    template = "write to {name} about the order"
    masking = Masking(MarkedFields(template, frozenset({"name"})), contacts=False)
    prompt, answer = masking.call(template.format(name=name), f"Dear {name.upper()} , {story}")
    assert prompt == "write to [name] about the order"
    if name.strip() and name.upper().casefold() == name.casefold():
        assert answer is not None and not answer.startswith(f"Dear {name.upper()} ,")


@given(
    st.text(st.sampled_from("ab \"\\\n\r\t\x01/'<&éß日😀"), max_size=12).map("Ada{}Love".format),
    st.sampled_from([" ", "\n", "\t", "\r", '"', "(", "\né\n", "\\", "/", "…"]),
    st.booleans(),
)
@example('Ada "A" Love', " ", False)
@example("Ada Love", "\n", True)
def test_a_marked_field_is_not_in_a_json_answer(name: str, beside: str, ascii_only: bool) -> None:
    masking = Masking(MarkedFields("a gift for {name}", frozenset({"name"})), contacts=False)

    def answered(who: str) -> str:
        return json.dumps({"who": f"dear{beside}{who}{beside}x"}, ensure_ascii=ascii_only)

    for answer in (answered(name), answered(name).replace("/", "\\/").replace("<", "\\u003C")):
        _, shown = masking.call(f"a gift for {name}", answer)
        assert shown is not None and json.loads(shown) == json.loads(answered("[name]"))


@given(WORDS, WORDS)
def test_a_field_is_never_shown_in_part(one: str, other: str) -> None:
    """Where a prompt can be read in two ways, none of it is shown."""
    template = "for {one} and {other}"
    text = template.format(one=one, other=other)
    prompt, answer = Masking(MarkedFields(template, frozenset({"one"})), contacts=False).call(
        text, "of course"
    )
    if f"{one} and {other}".count(" and ") == 1:
        assert prompt == f"for [one] and {other}" or one.strip() in other
        assert answer == "of course" or one.strip()
    else:
        assert prompt == f"[not shown: {len(text)} characters]"
        assert answer == "[not shown: 9 characters]"


@given(st.text(max_size=50))
def test_what_cannot_be_read_back_is_not_shown(text: str) -> None:
    with_logic = MarkedFields(None, frozenset({"title"}))
    assert Masking(with_logic).call(text, text) == (f"[not shown: {len(text)} characters]",) * 2
    assert Masking(MarkedFields(None, frozenset()), contacts=False).call("a b", "c") == ("a b", "c")


@given(
    st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1)
)
def test_a_larger_share_has_the_smaller_ones_calls(ids: list[bytes], one: float, other: float) -> None:
    less, more = sorted((one, other))
    few, many = ({i.hex() for i in ids if is_sampled(i.hex(), share)} for share in (less, more))
    assert few <= many
    assert not any(is_sampled(i.hex(), 0.0) for i in ids)
    assert all(is_sampled(i.hex(), 1.0) for i in ids)


def test_json_answers_stay_json() -> None:
    answer = json.dumps({"text": "call +49 30 1234567", "by": "a@b.example"})
    assert json.loads(Masking().text(answer)) == {"text": "call [phone]", "by": "[email]"}
