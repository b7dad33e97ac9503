"""YAML as this project reads it: plain data only, and a key that is written twice is an error that names both lines.

YAML's own rule (the last one wins) hides a mistake: a price, a cap or a learning rate that somebody believes is set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class YamlError(ValueError):
    """A file that cannot be read as YAML; the message names it and the line, and shows none of its values."""


def read_yaml(path: str | Path) -> Any:
    """The document in a YAML file; None where it is empty.

    Raises:
        OSError: the file cannot be read.
        YamlError: not UTF-8, not YAML, a tag that would make objects, or a key that is written twice, at any depth.
    """
    return read_yaml_lines(path)[0]


def read_yaml_lines(path: str | Path) -> tuple[Any, dict[Any, int]]:
    """`read_yaml`, and the line (from 1) of every key of the top mapping; none where it is no mapping."""
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")  # editors on Windows write a byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise YamlError(f"{path}:{line}: not valid YAML: byte {error.start} is not UTF-8; save it as UTF-8") from None
    return read_yaml_text(text, path)


def read_yaml_text(text: str, path: str | Path) -> tuple[Any, dict[Any, int]]:
    """`read_yaml_lines` of a text; `path`: what messages call it."""
    try:
        loader = _Strict(text, str(path))
    except yaml.YAMLError as error:  # a character that YAML does not allow
        position = min(getattr(error, "position", 0), len(text))
        line = text.count("\n", 0, position) + 1
        raise YamlError(f"{path}:{line}: not valid YAML: a character that YAML does not allow") from None
    try:
        document = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = getattr(mark, "line", 0) + 1  # without the text around it, which may hold a key
        raise YamlError(f"{path}:{line}: not valid YAML: {getattr(error, 'problem', 'unreadable')}") from None
    except YamlError:
        raise
    except (ValueError, RecursionError) as error:  # a date that no calendar has, ten thousand brackets
        raise YamlError(f"{path}: not valid YAML: {type(error).__name__}: {error}") from None
    finally:
        loader.dispose()
    return document, loader.top


class _Strict(yaml.SafeLoader):
    def __init__(self, text: str, path: str) -> None:
        super().__init__(text)
        self._path = path
        self._flat: set[int] = set()
        self.top: dict[Any, int] = {}

    def construct_document(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            self.top = self._lines(node)
        return super().construct_document(node)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Called before anchors are merged into a mapping (`<<: *base`): what they bring may be overridden by keys of
        # its own. A base is flattened again wherever it is merged, and holds both by then.
        if id(node) not in self._flat:
            self._flat.add(id(node))
            self._lines(node)
        super().flatten_mapping(node)

    def _lines(self, node: yaml.MappingNode) -> dict[Any, int]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a key that is a list or a mapping: the parent class refuses it
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.value if merge else self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in lines:
                raise YamlError(f"{self._path}:{line}: the key {key!r} was already written in line {lines[key]}")
            lines[key] = line
        return lines
