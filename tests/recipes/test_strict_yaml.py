"""One reader of YAML for catalogues, recipes and settings: a key that is written twice is an error with its line."""

import re
from pathlib import Path

import pytest
import yaml

from routers.data.catalogue import load_catalogue
from routers.router import ROUTER_FILE
from routers.tasks.think_route.settings import AgentSettings
from srpo import SRPOConfig
from srpo.recipe import RecipeError, load_recipe
from srpo.strict_yaml import YamlError, read_yaml, read_yaml_lines

ROOT = Path(__file__).parents[2]


def written(folder: Path, text: str, name: str = "file.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("text", "second", "first"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, 1),
        ("a: 1\n'a': 3\n", 2, 1),
        ("yes: 1\ntrue: 2\n", 2, 1),  # both are True
        ("1: x\n1.0: y\n", 2, 1),
        ("a:\n  - {x: 1,\n     y: 2,\n     x: 3}\n", 4, 2),
        ("a: {b: {c: {d: 1,\n d: 2}}}\n", 2, 1),
        ("base: &b {x: 1}\nd:\n  <<: *b\n  <<: *b\n", 4, 3),
        ("d: !!set {x,\n x}\n", 2, 1),
    ],
)
def test_a_key_written_twice_names_both_lines(tmp_path, text, second, first):
    path = written(tmp_path, text)
    with pytest.raises(YamlError, match=rf"^{re.escape(str(path))}:{second}: the key .* in line {first}$"):
        read_yaml(path)


def test_everything_else_reads_as_before(tmp_path):
    text = "\ufeffbase: &b {x: 1, y: [1, null]}\nd:\n  <<: *b\n  x: 2\ne: {<<: *b}\n5e-6: t\n"
    found, lines = read_yaml_lines(written(tmp_path, text))
    assert found == yaml.safe_load(text.removeprefix("\ufeff"))
    assert found["d"] == {"x": 2, "y": [1, None]}  # a key of its own overrides one that is merged in
    assert lines == {"base": 1, "d": 2, "e": 5, "5e-6": 6}
    assert read_yaml_lines(written(tmp_path, "# nothing\n")) == (None, {})
    assert read_yaml(written(tmp_path, "- a\n")) == ["a"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a: 1\nb: [\n", ":3: not valid YAML"),
        (b"a: !!python/name:os.system\n", ":1: not valid YAML"),
        (b"a: caf\xe9\n", ":1: not valid YAML: byte 6 is not UTF-8"),
        (b"a: 1\nb: \x01\n", ":2: not valid YAML"),
        (b"? [a]\n: 2\n", "unhashable"),
        (b"a: 2001-99-99\n", "month"),
        (b"a: 1\n---\nb: 1\n", ":2: not valid YAML"),
        (b"[" * 5000, "RecursionError"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, data, words):
    path = tmp_path / "file.yaml"
    path.write_bytes(data)
    with pytest.raises(YamlError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "\n" not in str(caught.value)


def test_every_file_of_ours_is_read_so(tmp_path):
    twice = "members:\n  - {name: a, descriptor: x, price_in: 1, price_out: 2,\n     price_in: 3}\n"
    with pytest.raises(ValueError, match=r"pool\.yaml:3: the key 'price_in' was already written in line 2"):
        load_catalogue(written(tmp_path, twice, "pool.yaml"))
    with pytest.raises(RecipeError, match=r"r\.yaml:3: the key 'b' was already written in line 2"):
        load_recipe(
            SRPOConfig, ["--config", str(written(tmp_path, "chat_template_kwargs:\n  b: 1\n  b: 2\n", "r.yaml"))]
        )
    written(tmp_path, "kind: a\nkind: b\n", ROUTER_FILE)
    with pytest.raises(ValueError, match=r"router\.yaml:2: the key 'kind'"):
        AgentSettings.load(tmp_path)


def test_nothing_reads_yaml_in_another_way():
    sources = [path for folder in ("srpo", "routers", "rewards", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    readers = [path.name for path in sources if re.search(r"yaml\.(safe_|full_|unsafe_)?load", path.read_text())]
    assert readers == []
