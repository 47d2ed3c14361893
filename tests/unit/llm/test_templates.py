"""Templates in Jinja: what they can do, what they cannot, and that each of them ends."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from featurekit_spark.errors import BuildError, ConfigError
from featurekit_spark.llm.templates import (
    LONGEST_PROMPT,
    LONGEST_TEMPLATE,
    MOST_STEPS,
    check_template,
    render_jinja,
)


def rendered(template: str, title: str = "Red lamp") -> str:
    (found,) = render_jinja(template, {"title": [title]})
    assert isinstance(found, str), found
    return found


@given(st.text())
@example("{{ 7*7 }} {% if true %} {# x #}")
@example("{{ title.__class__ }}\n<b>&amp;</b>")
@example("\r\n{title}")
def test_data_is_put_in_as_it_is(title: str) -> None:
    assert rendered("for {{ title }}!\n", title) == f"for {title}!\n"


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ title | upper }}", "RED LAMP"),
        ("{{ title[:3] | lower }}", "red"),
        ("{% if title | length > 5 %}long{% else %}short{% endif %} {{ title }}", "long Red lamp"),
        ("{{ 'lamp' if 'lamp' in title else 'thing' }}", "lamp"),
        (
            "{% for word in title | split %}{{ loop.index }}={{ word }}{{ ', ' if not loop.last }}{% endfor %}",
            "1=Red, 2=lamp",
        ),
        ("{% for word in title | split if word is not eq 'Red' %}{{ word }}{% endfor %}", "lamp"),
        ("{{ title | split | reverse | join('-') }}", "lamp-Red"),
        ("{{ title | replace('Red', 'Blue') | truncate(4, end='', leeway=0) }}", "Blue"),
        ("{{ title | tojson }}", '"Red lamp"'),
        ("{{ title ~ '!' }}{{ (title | wordcount) + 1 }}", "Red lamp!3"),
        ("{% raw %}{{ {% {% endraw %}{{ title }}{# no #}", "{{ {% Red lamp"),
        ("{{ title[99] | default('none') }}", "none"),
        ("{{ '<b>' }}{{ title }}", "<b>Red lamp"),
    ],
)
def test_conditions_loops_and_filters(template: str, found: str) -> None:
    assert rendered(template) == found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ titel }} {{ title }}",
            "has the field 'titel', which nothing gives. Known: title. Did you mean 'title'",
        ),
        ("for {title}", "reads no field.*write a field as {{ title }}"),
        ("{{ title", "no Jinja template.*line 1"),
        ("{{ title | uper }}", "No filter named 'uper'.*Did you mean 'upper'"),
        ("{{ title is odder }}", "No test named 'odder'"),
        ("{{ title.__class__ }}", "the attribute '__class__'"),
        ("{{ title.upper() }}", "'call'|the attribute 'upper'"),
        ("{{ title['__class__'] }}", "an index that is no number"),
        ("{{ title['up' ~ 'per'] }}", "an index that is no number"),
        ("{{ title|attr('__class__') }}", "No filter named 'attr'"),
        ("{{ title|map('upper') }}", "No filter named 'map'"),
        ("{{ title|format(1) }}", "No filter named 'format'"),
        ("{{ title|_counted }}", "the filter '_counted'"),
        ("{{ title }}{{ _steps }}", "the field '_steps'"),
        ("{{ title }}{{ self }}", "the name 'self'"),
        ("{{ range(9) }}{{ title }}", "'call'|the field 'range'"),
        ("{{ title }}{{ namespace() }}", "'call'|the field 'namespace'"),
        ("{{ title * 999999999 }}", "'mul'"),
        ("{{ 9 ** 9 ** 9 }}{{ title }}", "'pow'"),
        ("{{ '%999999999d' % 1 }}{{ title }}", "'mod'"),
        ("{% set x = title %}{{ x }}", "'assign'"),
        ("{% set x %}{{ title }}{% endset %}", "'assignblock'"),
        ("{% macro m() %}{{ title }}{% endmacro %}", "'macro'"),
        ("{% include 'x' %}{{ title }}", "'include'"),
        ("{% extends 'x' %}{{ title }}", "'extends'"),
        ("{% import 'x' as y %}{{ title }}", "'import'"),
        ("{% block b %}{{ title }}{% endblock %}", "'block'"),
        ("{% with x = title %}{{ x }}{% endwith %}", "'with'"),
        ("{% filter upper %}{{ title }}{% endfilter %}", "'filterblock'"),
        ("{% for a in title recursive %}{{ loop(a) }}{% endfor %}", "'call'|a recursive loop"),
        ("{% for a in title %}{{ loop.cycle('x') }}{% endfor %}", "'call'|the attribute 'cycle'"),
        ("{{ title }}" + "x" * LONGEST_TEMPLATE, "at most 10000 are allowed"),
        ("{{ " + "(" * 4000 + "title" + ")" * 4000 + " }}", "nested too deeply|no Jinja template"),
    ],
)
def test_what_a_template_may_not_do(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_template(template, {"title"})
    assert str(caught.value).startswith("prompt_template ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in title %}{% for b in title %}{% for c in title %}{% endfor %}{% endfor %}{% endfor %}",
            f"its loops take more than {MOST_STEPS} turns",
        ),
        ("{% for a in title %}{{ title }}{% endfor %}", f"more than {LONGEST_PROMPT} characters"),
        ("{{ title | list | join(title) }}", f"more than {LONGEST_PROMPT} characters"),
        ("{{ title | replace('', title) }}", f"more than {LONGEST_PROMPT} characters"),
        (
            "{{ title" + " | replace('x', 'xxxxxxxxxx')" * 50 + " }}",
            f"more than {LONGEST_PROMPT} characters",
        ),
    ],
)
def test_a_template_that_would_never_end_is_an_error(template: str, message: str) -> None:
    start = time.monotonic()
    found = render_jinja(template, {"title": ["x" * 900]})
    assert time.monotonic() - start < 5
    assert isinstance(found[0], BuildError)
    assert message in str(found[0])


def test_an_error_is_that_row_s_alone_and_names_template_and_field() -> None:
    template = "{{ title[3] }}"
    found = render_jinja(template, {"title": ["lamp", "b", "lamb"]})
    assert found[0] == "p" and found[2] == "b"
    assert isinstance(found[1], BuildError)
    assert repr(template) in str(found[1]) and "title" in str(found[1])
