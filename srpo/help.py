"""What `srpo train --help` prints, and recipes/KEYS.md: the keys of a recipe, read from their dataclasses.

The first screen needs neither torch nor TRL; `--help-all` and KEYS.md show TRL's keys too and import it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from srpo.recipe import describe, task_of
from srpo.settings import Settings
from srpo.task import RunArguments, find_task, task_names

WIDTH = 116
_USAGE = """\
usage: srpo train RECIPE [--key value ...]        a file, or a shipped name: srpo recipes lists them
       srpo train RECIPE --processes 8 [--accelerate fsdp2]      several processes, through accelerate
       srpo train --task NAME --help              the keys of {tasks}
       srpo train --help-all                      what every key does, TRL's included

example: srpo train quickstart/srpo --cost_weight 0.4 --seed 1

Every key stands in the recipe (key: value) or on the command line (--key value), which wins.
"""


EVALUATE = """\
usage: srpo evaluate MODEL --output_dir FOLDER [--config RECIPE] [--key value ...]
       srpo evaluate MODEL --output_dir FOLDER --processes 8       several processes, through accelerate

Plays the held-out items with a trained policy and the baselines again, and writes evaluation.parquet and the report.
MODEL is the OUTPUT folder of a run, a checkpoint or start/ in it, or a Hub id. The recipe is the one that lies there
or above, unless --config names another; every key of it can be set (srpo train --help).

example: srpo evaluate outputs/quickstart/router --output_dir outputs/again --heldout_limit 100
"""


@dataclass(frozen=True)
class Key:
    """A key of a recipe."""

    name: str
    type: str
    default: str
    choices: tuple[str, ...]
    help: str


def keys_of(cls: Any, leave_out: frozenset[str] = frozenset()) -> Iterator[Key]:
    """The keys that a dataclass brings, in its order."""
    hints = get_type_hints(cls)
    for one in fields(cls):
        if one.init and one.name not in leave_out:
            help_ = " ".join(str(one.metadata.get("help") or "").split()).replace("%%", "%")
            hint = hints[one.name]
            kind = describe(hint)
            words = one.metadata.get("choices") or (get_args(hint) if get_origin(hint) is Literal else ())
            yield Key(one.name, kind, _default(one), tuple(map(str, words)), help_)


def _default(one: Field[Any]) -> str:
    if one.default_factory is not MISSING:
        value = one.default_factory()
    elif one.default is MISSING:
        return "required"
    else:
        value = one.default
    value = getattr(value, "value", value)  # of an Enum
    if value is None or value == "":
        return ""
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)


def print_train_help(words: Sequence[str]) -> bool:
    """Print the help that a command line of `srpo train` asks for; False: it asks for none."""
    asked = {"-h", "--help", "--help-all", "--help_all"} & {*words}
    if not asked:
        return False
    rest = [word for word in words if word not in asked]
    name = task_of(rest)
    print(train_help(name, everything=bool(asked - {"-h", "--help"})))
    return True


def train_help(task: str | None = None, *, everything: bool = False) -> str:
    """The screen: run, task (all of them with `everything`), ours; with `everything` TRL's and each key's sentence."""
    names = [task] if task else task_names()
    parts = [_USAGE.format(tasks=", ".join(task_names()))]
    show = _paragraphs if everything else _columns
    for heading, _, keys in _groups(names if task or everything else [], everything):
        parts.append(f"{heading}\n{show(keys)}")
    return "\n".join(parts)


def _groups(tasks: Sequence[str], trl: bool) -> Iterator[tuple[str, str, list[Key]]]:
    """Heading, source, keys."""
    yield "every run", "srpo.task.RunArguments", list(keys_of(RunArguments))
    for name in tasks:
        arguments = find_task(name).Arguments
        yield f"task: {name}", f"{arguments.__module__}.{arguments.__qualname__}", list(keys_of(arguments))
    ours = list(keys_of(Settings))
    yield "objective, teacher, branches, episodes, replay", "srpo.settings.Settings", ours
    if trl:
        from srpo.config import SRPOConfig

        theirs = list(keys_of(SRPOConfig, leave_out=frozenset(key.name for key in ours)))
        yield "TRL's GRPOConfig and transformers' TrainingArguments", "trl, transformers", theirs


def _columns(keys: Sequence[Key]) -> str:
    """Two columns of `name = default (choices)`."""
    half, lines, line = WIDTH // 2, [], ""
    for key in keys:
        default = key.default if len(key.default) < 24 else "..."
        others = [word for word in key.choices if repr(word) != key.default]
        text = f"  {key.name}" + (f" = {default}" if default else "")
        text += f"  (or {', '.join(others)})" if others else ""
        if len(text) >= half:
            lines.append(text)
        elif line:
            lines.append(f"{line:{half}}{text}".rstrip())
            line = ""
        else:
            line = text
    return "\n".join(lines + [line] * bool(line)) + "\n"


def _paragraphs(keys: Sequence[Key]) -> str:
    """A key, what it may be, and what it does."""
    lines = []
    for key in keys:
        kind = ", ".join(key.choices) or key.type
        lines.append(f"  {key.name}: {kind}" + (f" [{key.default}]" if key.default else ""))
        lines += textwrap.wrap(key.help, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def keys_table() -> str:
    """recipes/KEYS.md."""
    lines = [
        "# Keys of a recipe",
        "",
        "Written by `srpo recipes keys > recipes/KEYS.md`; do not edit. The first key of a recipe is `task:`; on the",
        "command line every key is `--key value`. An empty default means that nothing is set.",
    ]
    for heading, source, keys in _groups(task_names(), trl=True):
        short = source.startswith("trl")
        lines += ["", f"## {heading[0].upper()}{heading[1:]}", "", f"Source: `{source}`", ""]
        lines += ["| key | type | default | what it does |", "|---|---|---|---|"]
        for key in keys:
            kind = ", ".join(f"`{word}`" for word in key.choices) or key.type
            what = key.help.split(". ")[0].rstrip(".") + "." if short and key.help else key.help
            cells = [f"`{key.name}`", kind, f"`{key.default}`" if key.default else "", what]
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
