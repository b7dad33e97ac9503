"""Recipes: one flat YAML file of `key: value` lines, as TRL's scripts read them, and `--key value` to override a line.

Strict where TRL is lenient: an unknown key, a key written twice, a value of the wrong type and a secret written into
the file are errors that name file, line and key, before anything expensive starts. TRL's parser reads the command
line, so options, aliases and `--help` are what its users know.
"""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from srpo.ranges import OutOfRange
from srpo.redact import holds_secret, redacted
from srpo.strict_yaml import YamlError, read_yaml_lines


class RecipeError(ValueError):
    """A recipe or a command line that cannot be used; the message says which file, which key, and what to write."""


@dataclass(frozen=True)
class _Given:
    """A value as it was given, and where, for messages."""

    value: Any
    where: str


class Recipe(tuple[Any, ...]):
    """The parsed dataclasses, in the order asked for; unpacks like the plain tuple that TRL's parser returns.

    Attributes:
        given: the keys that the file and the command line set, with their values; defaults left out.
        path: the recipe file, or None.
    """

    given: dict[str, Any]
    path: Path | None


def load_recipe(dataclass_types: Any, argv: Sequence[str] | None = None, *, partial: bool = False) -> Recipe:
    """Reads `--config recipe.yaml` and `--key value` overrides into dataclasses.

    Args:
        dataclass_types: one dataclass, or several; no two may share a field name.
        argv: command line without the program's name; None: `sys.argv[1:]`.
        partial: pass over keys of the file that belong to other dataclasses. For the recorded recipe of a run, which
            was checked then.

    Raises:
        RecipeError: unknown key (with the nearest valid one), key written twice, wrong type, missing key, a value that
            looks like a secret, or whatever a dataclass refuses in its `__post_init__`.
    """
    classes = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
    fields = {f.name: (cls, f) for cls in classes for f in dataclasses.fields(cls) if f.init}
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}

    path, rest = _split_config(list(sys.argv[1:] if argv is None else argv))
    given = _read_file(path) if path is not None else {}
    if partial:
        given = {key: item for key, item in given.items() if key in fields}
    for key, item in given.items():
        if key not in fields:
            raise RecipeError(f"{item.where}: unknown key {key!r}{_nearest(key, fields)}")
    given |= _read_command_line(classes, rest)

    values = {}
    for key, item in given.items():
        _refuse_secrets(key, item)
        values[key] = _checked(key, item, hints[key], fields[key][1])

    configs = []
    for cls in classes:
        own = [f for f in dataclasses.fields(cls) if f.init]
        missing = [
            f.name
            for f in own
            if f.name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        source = str(path) if path is not None else "command line"
        if missing:
            raise RecipeError(f"{source}: missing {', '.join(missing)} (of {cls.__name__})")
        try:
            configs.append(cls(**{f.name: values[f.name] for f in own if f.name in values}))
            if hasattr(configs[-1], "check"):
                configs[-1].check()  # a recipe is complete: nobody will set an objective later
        except (ValueError, TypeError) as error:
            named = given.get(error.name) if isinstance(error, OutOfRange) else None
            raise RecipeError(f"{named.where if named else source}: {error}") from error
    recipe = Recipe(configs)
    recipe.given, recipe.path = values, path
    return recipe


def resolved_recipe(recipe: Recipe) -> dict[str, Any]:
    """What reproduces the run: every key that file or command line set, secrets redacted, YAML-ready."""
    return redacted({key: value.value if isinstance(value, Enum) else value for key, value in recipe.given.items()})


def _refuse_secrets(key: str, item: _Given) -> None:
    # The value itself never stands in the message: messages end up in logs.
    if holds_secret(key, item.value):
        raise RecipeError(
            f"{item.where}: the value of {key!r} looks like a secret. Recipes are shared, so keep it out of them: set "
            f"an environment variable (HF_TOKEN, WANDB_API_KEY, ...) and delete this key"
        )


def _split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    paths, rest = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            value = next(words, None)
            if value is None:
                raise RecipeError("command line: --config needs the path of a recipe")
            paths.append(value)
        elif word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if len(paths) > 1:
        raise RecipeError(f"command line: --config is given {len(paths)} times; recipes do not inherit, use one")
    return (Path(paths[0]) if paths else None), rest


def _read_file(path: Path) -> dict[str, _Given]:
    """Keys, values and line numbers of a flat YAML mapping; keys written twice are refused at any depth."""
    try:
        content, lines = read_yaml_lines(path)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    except YamlError as error:
        raise RecipeError(str(error)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a list of `key: value` lines")
    return {str(key): _Given(value, f"{path}:{lines.get(key, 1)}") for key, value in content.items()}


def _read_command_line(classes: list[type], argv: list[str]) -> dict[str, _Given]:
    from trl import TrlParser  # here, because importing trl takes seconds

    class Parser(TrlParser):
        def error(self, message: str) -> Any:  # argparse would print 300 options and exit
            raise RecipeError(f"command line: {message}")

    parser = Parser(classes, allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    for action in parser._actions:  # only what is given may appear in the namespace: the file owns the rest
        if action.dest != "help":
            action.default, action.required = argparse.SUPPRESS, False
    namespace, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            key = word[2:].split("=")[0].replace("-", "_")
            valid = [action.dest for action in parser._actions]
            raise RecipeError(f"command line: unknown option '--{key}'{_nearest(key, valid)}")
    if unknown:
        raise RecipeError(f"command line: {unknown[0]!r} belongs to no option")
    return {key: _Given(value, f"command line, --{key}") for key, value in vars(namespace).items()}


def _nearest(key: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.0)
    return f"; the nearest valid name is {close[0]!r}" if close else ""


def _checked(key: str, item: _Given, hint: Any, field: "dataclasses.Field[Any]") -> Any:
    """The value as its annotation wants it; YAML 1.1 reads `5e-6` as text, so numbers are converted."""
    if item.value is None and field.default is None:
        return None
    ok, value = _fit(item.value, hint)
    if ok:
        return value
    advice = ""
    if isinstance(item.value, bool):
        advice = " (YAML reads yes, no, on and off as true and false: put the word in quotes)"
    elif item.value is None:
        advice = " (the line is empty: give a value or delete it)"
    elif _fit(str(item.value), hint)[0]:
        advice = " (put it in quotes)"
    found = f"{item.value!r} of type {type(item.value).__name__}"
    raise RecipeError(f"{item.where}: {key} must be {_describe(hint)}, not {found}{advice}")


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True, value
    if origin in (Union, UnionType):
        # An Enum beside str is TRL's way to say "one of these words".
        if isinstance(value, str) and any(_is_enum(arg) for arg in args):
            args = tuple(arg for arg in args if arg is not str)
        fits = (_fit(value, arg) for arg in sorted(args, key=lambda arg: arg is not type(value)))
        return next((fit for fit in fits if fit[0]), (False, value))
    if origin is Literal:
        return value in args, value
    if _is_enum(hint):
        words = [member.value for member in hint]
        return value in words or isinstance(value, hint), value
    if origin in (list, tuple) or hint in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False, value
        items = [_fit(item, args[0] if args else Any) for item in value]
        return all(ok for ok, _ in items), [item for _, item in items]
    if origin is dict or hint is dict:
        return isinstance(value, dict), value
    if hint is type(None):
        return value is None, value
    if hint is float:
        return _fit_float(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint in (bool, str):
        return isinstance(value, hint), value
    return True, value  # a type of another library: its own constructor checks it


def _fit_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, value
    try:
        return True, float(value)
    except ValueError:
        return False, value


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        enums = [arg for arg in args if _is_enum(arg)]
        words = [arg for arg in args if arg is not type(None) and not (enums and arg is str)]
        return " or ".join(_describe(arg) for arg in words)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if _is_enum(hint):
        return "one of " + ", ".join(str(member.value) for member in hint)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
    if hint in names:
        return names[hint]
    if origin in (list, tuple):
        return f"a list ({_describe(args[0])} each)" if args else "a list"
    return "a mapping" if origin is dict else str(hint)
