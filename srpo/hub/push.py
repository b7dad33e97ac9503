"""`srpo push FOLDER REPO`: a policy, `router.yaml`, recipe, picture and model card to the Hugging Face Hub.

What the Hub holds already is not sent again, so the same command finishes what was interrupted. A run pushes by this
command too, in a process of its own (`srpo.hub.jobs`). Exit codes:

    0     all of it is on the Hub, verified by hash; prints the URL of the commit
    2     nothing was pushed, and trying again will not help: a mistake, refused credentials
    75    the Hub has not taken it within `--deadline`: the same command later sends what is missing
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srpo.cli import Parser
from srpo.hub.errors import explain
from srpo.hub.files import CARD, ROUTER, files_to_push
from srpo.hub.upload import DEADLINE, NotPushed, create, push_checkpoint
from srpo.ranges import above, ranged
from srpo.redact import scrubbed

BYTES_PER_SECOND = 1e6
"""The slowest upload that a deadline allows for."""


def main(argv: Sequence[str] | None = None) -> None:
    """`srpo push FOLDER REPO`; prints the URL of the commit.

    Raises:
        ValueError: the folder holds no policy, or the Hub refuses; in one sentence.
        NotPushed: the Hub has not taken it within the deadline.
    """
    args = _parser().parse_args(argv)
    where: dict[str, Any] = {"private": args.private or None, "revision": args.revision, "token": None}
    if args.create:
        with _ended_after(args.deadline):
            print(_worded(lambda: create(args.repo, deadline=args.deadline, **where)))
        return
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: there is no such folder")
    if args.merged:
        with tempfile.TemporaryDirectory() as folder:
            _push(merged(args.folder, Path(folder), args.repo), args, where)
    else:
        _push(args.folder, args, where)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Upload a trained router: its policy, router.yaml, recipe, picture and card, and nothing else of "
        "the folder. Files that the Hub has already are not sent again.",
        epilog="example: srpo push outputs/quickstart/router my-name/my-router --private. Exit code 75: the Hub has "
        "not taken it within the deadline; the same command goes on later",
    )
    parser.add_argument("folder", type=Path, help="OUTPUT of a run, or a checkpoint or start/ in it")
    parser.add_argument("repo", help="name or owner/name; it is created where it is missing")
    parser.add_argument("--private", action="store_true", help="where it is created")
    parser.add_argument("--revision", help="branch, made where it is missing (default: main)")
    parser.add_argument("--message", default="Upload router", help="of the commit")
    parser.add_argument("--merged", action="store_true", help="an adapter as a whole model: merged with its base")
    parser.add_argument("--into", help="a folder of the repository; for a checkpoint with all that resuming needs")
    parser.add_argument("--also", nargs="+", default=[], help="names of further files of the folder")
    parser.add_argument("--create", action="store_true", help="make the repository, and push nothing")
    parser.add_argument(
        "--deadline", type=ranged(above(0)), default=DEADLINE, help=f"seconds, and one more for each MB ({DEADLINE:g})"
    )
    return parser


def _push(folder: Path, args: argparse.Namespace, where: dict[str, Any]) -> None:
    resumable = args.into is not None
    names = files_to_push(folder, resumable, args.also)
    if ROUTER not in names:
        print(f"{args.folder} holds no {ROUTER}: others can load the model, but not as a router", file=sys.stderr)
    deadline = args.deadline + sum((folder / name).stat().st_size for name in names) / BYTES_PER_SECOND
    how = {"path_in_repo": args.into, "commit_message": args.message, "resumable": resumable, "beside": args.also}
    with _ended_after(deadline):
        url = _worded(lambda: push_checkpoint(folder, args.repo, deadline=deadline, **how, **where))
    print(f"{url}  ({len(names)} files, verified)")


def _worded(act: Callable[[], str]) -> str:
    try:
        return act()
    except (NotPushed, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"nothing was pushed: {explain(error)}") from error


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ends the process, with the last that was heard of the Hub, where what is inside does not end in time.

    huggingface_hub waits, and repeats some requests, without an end, and its native uploader cannot be interrupted.
    """
    heard = _Heard()

    def end() -> None:
        last = f"; the last that was heard: {heard.last}" if heard.last else ""
        print(f"STOPPED: the Hub has not taken it within {seconds:.0f} s{last}", file=sys.stderr, flush=True)
        os._exit(NotPushed.code)

    timer = threading.Timer(seconds + 1, end)
    timer.daemon = True
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(heard)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        logger.removeHandler(heard)


class _Heard(logging.Handler):
    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        if "Retrying in" not in (text := record.getMessage()):
            self.last = scrubbed(text)


def merged(adapter: Path, folder: Path, repo_id: str) -> Path:
    """Writes the whole model that an adapter and its base make into `folder`, with what lies beside the adapter.

    Its card is written anew; one that is not ours says who knows what of an adapter, and is left out.

    Raises:
        ValueError: there is no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} holds no adapter (adapter_config.json): it is whole as it is, leave out --merged")
    from peft import AutoPeftModelForCausalLM

    from srpo.hub.card import merged_card
    from srpo.hub.hub import beside_card

    for name in files_to_push(adapter):
        if not name.startswith("adapter_") and name != CARD:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(adapter / name, folder / name)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload(safe_merge=True)
    model.save_pretrained(folder)
    if (adapter / CARD).is_file():
        about = beside_card(folder)
        card = merged_card(
            (adapter / CARD).read_text(encoding="utf-8"),
            repo_id=repo_id if "/" in repo_id else None,
            router=about["router"],
            hashes=about["hashes"],
        )
        if card is None:
            print(f"{adapter / CARD} is of the adapter, and not pushed: write one of the whole model", file=sys.stderr)
        else:
            (folder / CARD).write_text(card, encoding="utf-8")
    return folder


if __name__ == "__main__":  # a run's own push, which the run waits for and ends
    from srpo.cli import run
    from srpo.run.signals import turn_deaf

    turn_deaf()
    run(main)
