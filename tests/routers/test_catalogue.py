"""The price list: reading it, refusing bad ones by name, and the one pricing rule."""

from dataclasses import replace
from pathlib import Path

import pytest

from routers.data.catalogue import Member, cost, describe, load_catalogue

GOOD = "members:\n  - {name: a, descriptor: first, price_in: 0.1, price_out: 0.4}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "prices.yaml"
    path.write_text(text)
    return path


def test_reads_members_in_file_order(tmp_path):
    path = write(tmp_path, GOOD + "  - {name: Z, descriptor: ' second ', price_in: 0, price_out: 2}\n")
    assert load_catalogue(path) == {"a": Member("a", "first", 0.1, 0.4), "Z": Member("Z", "second", 0.0, 2.0)}
    assert list(load_catalogue(path)) == ["a", "Z"]


def test_cost_by_hand():
    # 1,000 prompt tokens at 3 USD per million = 0.003; 200 completion tokens at 15 = 0.003
    assert cost(Member("a", "x", 3.0, 15.0), 1000, 200) == pytest.approx(0.006, abs=1e-15)
    assert cost(Member("a", "x", 3.0, 15.0), 0, 0) == 0.0


@pytest.mark.parametrize("tokens", [(-1, 0), (0, -1)])
def test_cost_refuses_negative_tokens(tokens):
    with pytest.raises(ValueError, match="negative"):
        cost(Member("a", "x", 1.0, 1.0), *tokens)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: b, descriptor: x, price_in: 1}", ["'b'", "price_out", "missing", "USD per million"]),
        ("{name: b, descriptor: x, price_in: null, price_out: 1}", ["'b'", "price_in", "null"]),
        ("{name: b, descriptor: x, price_in: -1, price_out: 1}", ["'b'", "price_in", "-1"]),
        ("{name: b, descriptor: x, price_in: .nan, price_out: 1}", ["'b'", "price_in", "nan"]),
        ("{name: b, descriptor: x, price_in: .inf, price_out: 1}", ["'b'", "price_in", "inf"]),
        ("{name: b, descriptor: x, price_in: true, price_out: 1}", ["'b'", "price_in", "True"]),
        ("{name: b, descriptor: x, price_in: unknown, price_out: 1}", ["'b'", "price_in", "unknown"]),
        ("{name: b, descriptor: x, price_in: 1, price_out: 1, prize: 2}", ["'b'", "prize", "unknown field"]),
        ("{name: b, descriptor: '', price_in: 1, price_out: 1}", ["'b'", "descriptor"]),
        ('{name: b, descriptor: "two\\nlines", price_in: 1, price_out: 1}', ["'b'", "descriptor", "one line"]),
        ("{name: 3, descriptor: x, price_in: 1, price_out: 1}", ["name", "3"]),
        ("{descriptor: x, price_in: 1, price_out: 1}", ["number 1", "name"]),
        ("{name: a, descriptor: x, price_in: 1, price_out: 1}", ["'a'", "twice"]),
        ("just text", ["entry 1", "mapping"]),
    ],
)
def test_a_bad_entry_is_named(tmp_path, entry, words):
    path = write(tmp_path, GOOD + f"  - {entry}\n")
    with pytest.raises(ValueError) as caught:
        load_catalogue(path)
    for word in ["prices.yaml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "members: 3", "members: []", "- a", "models: []", "members: [", GOOD + "extra: 1\n"]
)
def test_a_bad_document_is_named(tmp_path, text):
    with pytest.raises(ValueError, match=r"prices\.yaml"):
        load_catalogue(write(tmp_path, text))


def test_yaml_cannot_run_code(tmp_path):
    target = tmp_path / "made"
    text = f"members: !!python/object/apply:os.mkdir ['{target}']"
    with pytest.raises(ValueError, match="not valid YAML"):
        load_catalogue(write(tmp_path, text))
    assert not target.exists()


LIVE = (
    "  - {name: b, descriptor: x, price_in: 1, price_out: 1, model: org/b, base_url: 'https://h/v1',"
    " api_key_env: B_KEY, context_length: 8192, max_tokens: 256, temperature: 0.1, top_p: 0.9, seed: 42,"
    " system: Be brief., concurrency: 4, requests_per_second: 2,"
    " request: {max_tokens: null, max_completion_tokens: 256, top_k: 5},"
    " tokens_per_minute: 1000, timeout: 9, latency: 0.81, examples: {nq: 0.412, gsm8k: 1}}\n"
)


def test_live_fields(tmp_path):
    assert load_catalogue(write(tmp_path, GOOD + LIVE))["b"] == Member(
        "b",
        "x",
        1.0,
        1.0,
        model="org/b",
        base_url="https://h/v1",
        api_key_env="B_KEY",
        context_length=8192,
        max_tokens=256,
        temperature=0.1,
        top_p=0.9,
        seed=42,
        system="Be brief.",
        request={"max_tokens": None, "max_completion_tokens": 256, "top_k": 5},
        concurrency=4,
        requests_per_second=2.0,
        tokens_per_minute=1000,
        timeout=9.0,
        latency=0.81,
        examples={"nq": 0.412, "gsm8k": 1.0},
    )


def test_describing_a_member():
    assert describe(Member("a", "easy facts", 0.1, 0.4)) == "easy facts ($0.1/0.4 per 1M tokens)"
    full = Member("a", "easy facts", 0.1, 12.0, latency=0.813, examples={"nq": 0.412, "gsm8k": 1.0})
    assert describe(full) == "easy facts ($0.1/12 per 1M tokens; 0.81 s; gsm8k 1.00, nq 0.41)"
    assert describe(replace(full, examples={"gsm8k": 1.0, "nq": 0.412})) == describe(full)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("base_url: h/v1", ["base_url", "https://host/v1"]),
        ("base_url: 'https://user:sk-secret@h/v1'", ["base_url", "without a key"]),
        ("api_key_env: sk-secret", ["api_key_env", "name of the environment variable"]),
        ("api_key_env: sk_secret", ["api_key_env", "never the key"]),
        ("api_key: sk-secret", ["api_key", "unknown field"]),
        ("max_tokens: 0", ["max_tokens", ">= 1"]),
        ("{max_tokens: 100, context_length: 100}", ["max_tokens", "context_length", "no room"]),
        ("temperature: -1", ["temperature"]),
        ("top_p: 0", ["top_p"]),
        ("concurrency: 1.5", ["concurrency"]),
        ("requests_per_second: 0", ["requests_per_second"]),
        ("timeout: .inf", ["timeout"]),
        ("examples: {nq: 41}", ["examples", "0 to 1"]),
        ("examples: [1]", ["examples"]),
        ("seed: yes", ["seed"]),
        ("request: {stream: true, auth: secret}", ["request", "stream"]),
        ("request: [1]", ["request", "mapping"]),
        ("request: {max_tokens: null}", ["request", "longest reply", "max_completion_tokens"]),
        ("request: {max_tokens: null, max_completion_tokens: 513}", ["request", "longest reply"]),
        ("request: {max_completion_tokens: 9}", ["request", "longest reply"]),
        ("request: {n_predict: 9000}", ["request", "longest reply"]),
        ("request: {max_new_tokens: [1]}", ["request", "longest reply"]),
        ("request: {best_of: 4}", ["request", "number of replies"]),
    ],
)
def test_a_bad_live_field_is_named_and_a_key_is_never_shown(tmp_path, field, words):
    path = write(tmp_path, GOOD + f"  - {{name: b, descriptor: x, price_in: 1, price_out: 1, {field.strip('{}')}}}\n")
    if ": {" in field:
        path = write(tmp_path, GOOD + f"  - {{name: b, descriptor: x, price_in: 1, price_out: 1, {field}}}\n")
    with pytest.raises(ValueError) as caught:
        load_catalogue(path)
    for word in ["prices.yaml", "'b'", *words]:
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)


TABLE = """{"sample_spec": {"input_cost_per_token": 0.0},
 "gpt-x": {"input_cost_per_token": 1.5e-07, "output_cost_per_token": 6e-07, "max_input_tokens": 128000},
 "vendor/gpt-x": {"input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06, "max_input_tokens": "many"},
 "embedder": {"input_cost_per_token": 1e-07}}"""


def test_prices_come_from_litellms_table(tmp_path):
    (tmp_path / "prices.json").write_text(TABLE)
    lines = [
        "price_table: prices.json",
        "members:",
        "  - {name: a, descriptor: x, price_from: 'litellm:gpt-x'}",
        "  - {name: b, descriptor: x, price_from: 'litellm:vendor/gpt-x', price_out: 5}",
    ]
    members = load_catalogue(write(tmp_path, "\n".join(lines)))
    assert members["a"] == Member("a", "x", 0.15, 0.6, context_length=128000)
    assert members["b"] == Member("b", "x", 1.0, 5.0)  # what stands in the catalogue wins


@pytest.mark.parametrize(
    ("table", "source", "words"),
    [
        (TABLE, "litellm:gpt", ["gpt-x", "vendor/gpt-x"]),
        (TABLE, "litellm:embedder", ["output_cost_per_token", "price_out"]),
        (TABLE, "gpt-x", ["litellm:MODEL_KEY"]),
        ("[1]", "litellm:gpt-x", ["download", "https://"]),
        ("{", "litellm:gpt-x", ["download", "https://"]),
        (None, "litellm:gpt-x", ["prices.json", "download"]),
    ],
)
def test_a_price_that_is_not_in_the_table_is_named(tmp_path, table, source, words):
    if table is not None:
        (tmp_path / "prices.json").write_text(table)
    entry = f"price_table: prices.json\nmembers:\n  - {{name: a, descriptor: x, price_from: '{source}'}}\n"
    with pytest.raises(ValueError) as caught:
        load_catalogue(write(tmp_path, entry))
    for word in ["prices.yaml", "'a'", "price_from", source, *words]:
        assert word in str(caught.value)


def test_without_a_table_the_error_says_where_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setattr("routers.data.prices.find_spec", lambda name: None)
    entry = "members:\n  - {name: a, descriptor: x, price_from: 'litellm:gpt-x'}\n"
    with pytest.raises(ValueError, match="price_table, or pip install litellm"):
        load_catalogue(write(tmp_path, entry))


def test_an_installed_litellm_has_a_table(tmp_path, monkeypatch):
    package = tmp_path / "litellm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "model_prices_and_context_window_backup.json").write_text(TABLE)
    monkeypatch.syspath_prepend(tmp_path)
    entry = "members:\n  - {name: a, descriptor: x, price_from: 'litellm:gpt-x'}\n"
    assert load_catalogue(write(tmp_path, entry))["a"].price_out == 0.6


def test_a_catalogue_that_is_no_yaml_shows_no_text_of_it(tmp_path):
    with pytest.raises(ValueError, match=r"prices\.yaml:3: not valid YAML") as caught:
        load_catalogue(write(tmp_path, "members:\n  - {name: a, key: sk-secret\n- ["))
    assert "secret" not in str(caught.value)
