"""Recipes: one flat YAML file of `key: value` lines, and `--key value` on the command line to override one.

Unknown and old keys, a key written twice, a value of the wrong type and a secret written into the file are errors that
name file, line and key, before anything expensive starts. Only `SRPOConfig`, which brings TRL's keys, is slow to
import.
"""

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from srpo.cli import underscored
from srpo.ranges import OutOfRange
from srpo.redact import holds_secret, redacted
from srpo.settings import Settings, check_choices
from srpo.shipped import find_recipe, no_recipe, shipped_path
from srpo.strict_yaml import YamlError, read_yaml_lines, read_yaml_text

if TYPE_CHECKING:
    from srpo.task import Task

OLD_KEYS = {
    "warm_start_epochs": "sft_epochs",
    "warm_start_passes": "sft_epochs",
    "bosft_epochs": "sft_epochs",
    "warm_start_learning_rate": "sft_learning_rate",
    "bosft_learning_rate": "sft_learning_rate",
    "warm_start_batch_size": "sft_batch_size",
    "bosft_batch_size": "sft_batch_size",
    "warm_start_limit": "sft_limit",
    "warm_start_drills": "sft_drills",
    "bosft_sweep": "sft_sweep",
    "bosft_keep": "sft_keep",
    "bosft_strata": "sft_strata",
    "bosft_policy": "start_from",
    "train_count": "train_limit",
    "heldout_count": "heldout_limit",
    "eval_limit": "heldout_limit",
    "eval_caps": "heldout_caps",
    "eval_temperature": "heldout_temperature",
}
"""Key of version 0.2 -> its name now. Each is an error for one release."""


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


def load_run(argv: Sequence[str] | None = None) -> "tuple[type[Task], Recipe]":
    """The task that a recipe names, and the recipe as `(arguments, run, config)`: the dataclasses `task.Arguments`,
    `srpo.task.RunArguments` and `srpo.SRPOConfig`.

    Args:
        argv: command line without the program's name; None: `sys.argv[1:]`. `RECIPE` or `--config RECIPE` is a file,
            or the name of a shipped recipe (`quickstart/srpo`).

    Raises:
        RecipeError: as `load_recipe`.
        ValueError: no installed task has the name.
        SystemExit: help was asked for, and printed.
    """
    from srpo.help import print_train_help
    from srpo.task import RunArguments

    words = list(sys.argv[1:] if argv is None else argv)
    if print_train_help(words):
        raise SystemExit(0)
    task = glance(words)
    from srpo.config import SRPOConfig  # imports TRL

    return task, load_recipe((task.Arguments, RunArguments, SRPOConfig), words)


def glance(words: Sequence[str]) -> "type[Task]":
    """The task that a command line of `srpo train` names. Raises as `load_run`, but sees no mistake in TRL's keys,
    which are slow to import."""
    from srpo.task import RunArguments, find_task, task_names

    name = task_of(words)
    if name is None:
        raise RecipeError(f"no task is named: begin the recipe with `task:` and one of {', '.join(task_names())}")
    task = find_task(name)
    load_recipe((task.Arguments, RunArguments, Settings), words, partial=True, unknown_options=True)
    return task


def task_of(words: Sequence[str]) -> str | None:
    """What a command line, or the recipe that it names, says under `task`."""
    path, rest = _split_config(words)
    given = {} if path is None else _read_file(path)
    for i, word in enumerate(rest):
        if word == "--task" and rest[i + 1 :]:
            return rest[i + 1]
        if word.startswith("--task="):
            return word.removeprefix("--task=")
    return str(given["task"].value) if "task" in given else None


def load_recipe(
    dataclass_types: Any,
    argv: Sequence[str] | None = None,
    *,
    partial: bool = False,
    unknown_options: bool = False,
) -> Recipe:
    """Reads `--config recipe.yaml` (or `recipe.yaml`) and `--key value` overrides into dataclasses.

    Args:
        dataclass_types: one dataclass, or several; no two may share a field name.
        argv: command line without the program's name; None: `sys.argv[1:]`.
        partial: pass over keys of the file that belong to other dataclasses. For the recorded recipe of a run, which
            was checked then. Old keys are errors all the same.
        unknown_options: pass over those of the command line too.

    Raises:
        RecipeError: unknown key (with the nearest valid one), old key (with the new one), key written twice, wrong
            type, missing key, a value that looks like a secret, or whatever a dataclass refuses in `__post_init__`.
    """
    classes = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
    hints: dict[str, Any] = {}
    fields: dict[str, dataclasses.Field[Any]] = {}
    for cls in classes:
        own = {f.name: f for f in dataclasses.fields(cls) if f.init}
        if twice := own.keys() & fields.keys():
            raise TypeError(f"{cls.__name__} has a field that another part of the recipe has: {', '.join(twice)}")
        fields |= own
        hints |= {name: hint for name, hint in get_type_hints(cls).items() if name in own}

    path, rest = _split_config(sys.argv[1:] if argv is None else argv)
    given = {} if path is None else _read_file(path)
    for key, item in given.items():
        if key in OLD_KEYS or (key not in fields and not partial):
            raise RecipeError(f"{item.where}: {_unknown('key', key, fields)}")
    given = {key: item for key, item in given.items() if key in fields}
    given |= _read_command_line(rest, hints, unknown_options)

    values = {}
    for key, item in given.items():
        _refuse_secrets(key, item)
        values[key] = _checked(key, item, hints[key], fields[key])

    source = str(path) if path is not None else "command line"
    recipe = Recipe(_made(cls, values, given, source) for cls in classes)
    recipe.given, recipe.path = values, path
    return recipe


def _made(cls: Any, values: Mapping[str, Any], given: Mapping[str, "_Given"], source: str) -> Any:
    """One of a recipe's dataclasses."""
    own = [f for f in dataclasses.fields(cls) if f.init]
    missing = [
        f.name
        for f in own
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{source}: missing {', '.join(missing)} (of {cls.__name__})")
    try:
        made = cls(**{f.name: values[f.name] for f in own if f.name in values})
        check_choices(made)
        if hasattr(made, "check"):
            made.check()  # a recipe is complete: nobody will set an objective later
    except (ValueError, TypeError) as error:
        named = given.get(error.name) if isinstance(error, OutOfRange) else None
        raise RecipeError(f"{named.where if named else source}: {error}") from error
    return made


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


def _split_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    paths, rest = [], []
    words = iter(argv)
    for i, word in enumerate(words):
        if word == "--config":
            value = next(words, None)
            if value is None:
                raise RecipeError("command line: --config needs the path of a recipe")
            paths.append(value)
        elif word.startswith("--config="):
            paths.append(word.removeprefix("--config="))
        elif i == 0 and not word.startswith("-"):
            paths.append(word)
        else:
            rest.append(word)
    if len(paths) > 1:
        raise RecipeError(f"command line: --config is given {len(paths)} times; recipes do not inherit, use one")
    return (find_recipe(paths[0]) if paths else None), rest


def _read_file(path: Path) -> dict[str, _Given]:
    """Keys, values and line numbers of a flat YAML mapping; keys written twice are refused at any depth."""
    try:
        content, lines = read_yaml_lines(path)
    except FileNotFoundError:
        raise RecipeError(no_recipe(path)) from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    except YamlError as error:
        raise RecipeError(str(error)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a list of `key: value` lines")
    return {str(key): _Given(shipped_path(value), f"{path}:{lines.get(key, 1)}") for key, value in content.items()}


def _read_command_line(argv: Sequence[str], hints: Mapping[str, Any], unknown: bool) -> dict[str, _Given]:
    """`--key value`, `--key=value`, `--list a b c`, `--flag` and `--no_flag`; dashes are underscores.

    Args:
        unknown: pass over an option that belongs to none of the `hints`.
    """
    given: dict[str, _Given] = {}
    words = underscored(argv)
    while words:
        option, equals, value = words.pop(0).partition("=")
        if not option.startswith("--"):
            raise RecipeError(f"command line: {option!r} belongs to no option")
        key = option[2:]
        where = f"command line, --{key}"
        if key not in hints and hints.get(key.removeprefix("no_")) is bool and not equals:
            given[key.removeprefix("no_")] = _Given(False, where)
            continue
        if key in OLD_KEYS or (key not in hints and not unknown):
            raise RecipeError(f"command line: {_unknown('option', '--' + key, hints)}")
        mine = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            mine.append(words.pop(0))
        if key not in hints:
            continue
        if not mine and _fit(True, hints[key])[0]:
            given[key] = _Given(True, where)
        elif not mine:
            raise RecipeError(f"{where}: a value is missing; {key} must be {describe(hints[key])}")
        else:
            given[key] = _Given(_read_words(mine, hints[key]), where)
    return given


def _read_words(words: list[str], hint: Any) -> Any:
    """What a type makes of the words after an option: YAML's reading where the type takes it, else the text."""
    readings = []
    for word in words:
        try:
            readings.append(read_yaml_text(word, "command line")[0])
        except YamlError:
            readings.append(word)
    whole: list[Any] = [readings[0], words[0]] if len(words) == 1 else []
    for reading in [*whole, readings, words]:
        if _fit(reading, hint)[0]:
            return reading
    return words[0] if len(words) == 1 else words


def _unknown(what: str, name: str, valid: Iterable[str]) -> str:
    key = name.removeprefix("--")
    if key in OLD_KEYS:
        return f"{name!r} is now {OLD_KEYS[key]!r}"
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.0)
    return f"unknown {what} {name!r}" + (f"; the nearest valid name is {close[0]!r}" if close else "")


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
    raise RecipeError(f"{item.where}: {key} must be {describe(hint)}, not {found}{advice}")


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
        if not isinstance(value, dict):
            return False, value
        entries = {key: _fit(item, args[1] if args else Any) for key, item in value.items()}
        return all(ok for ok, _ in entries.values()), {key: item for key, (_, item) in entries.items()}
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
        return True, float(value.replace(".inf", "inf") if isinstance(value, str) else value)
    except ValueError:
        return False, value


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        enums = [arg for arg in args if _is_enum(arg)]
        words = [arg for arg in args if arg is not type(None) and not (enums and arg is str)]
        return " or ".join(describe(arg) for arg in words)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if _is_enum(hint):
        return "one of " + ", ".join(str(member.value) for member in hint)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
    if hint in names:
        return names[hint]
    if origin in (list, tuple):
        return f"a list ({describe(args[0])} each)" if args else "a list"
    return "a mapping" if origin is dict else str(hint)
