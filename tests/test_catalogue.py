"""The price list: reading it, refusing bad ones by name, and the one pricing rule."""

from pathlib import Path

import pytest

from routers.catalogue import Member, cost, load_catalogue

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
