"""The command `srpo`, and how it ends: a user's mistake with one line and exit code 2, a fault with its traceback.

What our code raises on purpose (`raise ValueError(...)` in srpo, routers, rewards or a script) is worded for the user,
and so is what the system says of a file. Anything else is a fault, and its traceback is what a report of it needs.
`python -X dev` shows the traceback of mistakes too.
"""

import argparse
import linecache
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from srpo.run.signals import heeded
from srpo.types import Stopped

# Command -> the module whose `main(argv)` it calls, and what it does. Modules are named by text: this table is the one
# place in srpo that knows of routers.
COMMANDS = {
    "train": ("srpo.train", "train a policy from a recipe: SFT start, RL, evaluation, report"),
    "evaluate": ("srpo.evaluate", "play a trained router's held-out items again"),
    "compare": ("routers.evaluation.compare", "evaluations of several runs in one table and one cost plane"),
    "frontier": ("routers.tasks.query_routing.frontier", "every baseline and the encoder policy on one table"),
    "route": ("routers.serving.route", "send one query or a file of them through a trained router"),
    "serve": ("routers.serving.commands", "a trained router as an OpenAI-compatible server"),
    "play": ("routers.tasks.step_routing.play", "watch a step router act in an environment"),
    "push": ("srpo.hub.push", "a finished OUTPUT folder to the Hugging Face Hub: policy, router.yaml, card"),
    "record": ("routers.pool.record", "ask every member of your pool every query once, into a table"),
    "prices": ("routers.data.prices_command", "members' prices: show them, refresh them from litellm's table"),
    "convert": ("routers.data.converters.command", "a published routing data set into a table"),
    "export": ("routers.serving.export", "a router's choices in the form of RouterArena or Semantic Router"),
    "plan": ("srpo.plan", "what a recipe would do: steps, rows, processes, checkpoints, bounds of cost"),
    "recipes": ("srpo.shipped", "list the shipped recipes, copy one, print all keys"),
}
_LAUNCHED = ("train", "evaluate")
"""Commands that several processes can run together."""
_OURS = ("srpo", "routers", "rewards")
_EXTRAS = {"fastapi": "serve", "openai": "serve", "starlette": "serve", "uvicorn": "serve"}
_OTHERS_WAIT = 30.0
"""Seconds that a process gives another to say the same mistake, and the launcher to end all."""


class Parser(argparse.ArgumentParser):
    """argparse's, of which options have underscores, as the keys of recipes, and are taken with dashes too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(underscored(sys.argv[1:] if args is None else args), namespace)


def underscored(words: Sequence[str]) -> list[str]:
    """`--max-cost=a-b` -> `--max_cost=a-b`, up to a `--`: the one spelling of options."""
    end = list(words).index("--") if "--" in words else len(words)
    split = [word.partition("=") if word.startswith("--") else ("", "", word) for word in words[:end]]
    return ["".join((name[:2], name[2:].replace("-", "_"), *rest)) for name, *rest in split] + list(words[end:])


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """`srpo COMMAND ...`."""
    words = list(sys.argv[1:] if argv is None else argv)
    run(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> Any:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name, rest = words[0], words[1:]
    if name in ("-V", "--version"):
        from srpo import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        raise ValueError(f"srpo {name} is no command; the nearest is srpo {close[0]}; srpo --help lists all")
    if name in _LAUNCHED:  # before their modules import torch
        from srpo.help import EVALUATE, print_train_help

        if name == "train" and print_train_help(rest):
            return 0
        if name == "evaluate" and {"-h", "--help"} & {*rest}:
            print(EVALUATE)
            return 0
    module = COMMANDS[name][0]
    processes: tuple[Path | None, int | None] = (None, None)
    if name in _LAUNCHED:
        from srpo.launch import launch, launch_options

        processes = launch_options(rest)
    if name == "train":
        from srpo.recipe import glance

        glance(rest)
    if processes != (None, None):
        return launch(module, *processes, rest)
    sys.argv = [f"srpo {name}", *rest]  # what argparse calls the program
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries, which would fill a log file
    with heeded() if name == "train" else nullcontext():  # a signal while it imports torch, too
        return import_module(module).main(rest)


def _overview() -> str:
    lines = ["usage: srpo COMMAND ...      (srpo COMMAND --help says more)", ""]
    lines += [f"  {name:10}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([*lines, "", "example: srpo train quickstart/srpo"])


def run(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and end the process: its integer, 0 for anything else, 2 after a user's mistake; where it was
    `Stopped` 1, or 75 where all is done and the Hub has not taken it (`srpo.hub.upload.NotPushed`)."""
    try:
        code = main()
    except Stopped as stopped:
        if getattr(stopped, "said", False):
            time.sleep(_OTHERS_WAIT)
        else:
            print(f"STOPPED: {_one_line(stopped)}", file=sys.stderr, flush=True)
        sys.exit(stopped.code)
    except Exception as error:
        if sys.flags.dev_mode or not is_mistake(error):
            raise
        rank, said = os.environ.get("RANK", "0"), getattr(error, "said", False)
        # All processes read one recipe, and may find the same mistake: the first one says it, unless the mistake is
        # another's only, or that one was quicker (`srpo.run.watch` sets `first`, and `said` on the others).
        if said or (rank != "0" and not getattr(error, "first", False)):
            time.sleep(_OTHERS_WAIT)
        if not said:
            who = "" if rank == "0" else f"process {rank}: "
            print(f"{who}error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def is_mistake(error: BaseException) -> bool:
    """Whether an exception is worded for the user."""
    if isinstance(error, OSError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] not in _OURS
    return isinstance(error, (ValueError, TypeError, ImportError)) and _raised_by_us(error)


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    module, file = str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_frame.f_code.co_filename
    ours = module.split(".")[0] in _OURS or Path(file).parent == Path(sys.argv[0]).resolve().parent
    return ours and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise")


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = _EXTRAS.get(error.name.split(".")[0])
        text += f": pip install {f'{chr(39)}srpo[{extra}]{chr(39)}' if extra else error.name.split('.')[0]}"
    return " ".join(text.split()) or type(error).__name__
