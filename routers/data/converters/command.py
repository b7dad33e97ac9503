"""Make a table of recorded replies out of a published routing data set, or of any wide table.

srpo convert --list
srpo convert routellm_gsm8k RouteLLM/routellm/evals/gsm8k --output data/routellm/table.parquet
srpo train quickstart/srpo --table data/routellm/table.parquet
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from routers.data.converters import SETS, convert
from srpo.cli import Parser
from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import between, ranged


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the set; --list has all")
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="file, or a folder above what was downloaded")
    parser.add_argument("--output", type=Path, metavar="TABLE.parquet", help="catalogue.yaml is written beside it")
    parser.add_argument(
        "--members", metavar="A,B", action="append", help="the pool; default: the one that keeps most replies"
    )
    share = ranged(between(0, 1))
    parser.add_argument(
        "--max_bad_share", type=share, default=MAX_BAD_SHARE, help="of a file's entries, left out (.05)"
    )
    parser.add_argument("--list", action="store_true", help="the sets, where they are from, what they have and lack")
    args = parser.parse_args(argv)
    if args.list:
        print(listing())
        return
    if None in (args.name, args.source, args.output):
        raise ValueError("give NAME, SOURCE and --output TABLE.parquet, or --list")
    if args.output.suffix != ".parquet":
        raise ValueError(f"--output {args.output}: its name must end in .parquet")
    if args.output.exists() and args.output.samefile(args.source):
        raise ValueError(f"--output {args.output} is the source itself: name another file")
    converted = convert(args.name, args.source, args.members, args.max_bad_share)
    files = converted.write(args.output)
    print(f"{args.name}: {converted.summary()}; prices: {SETS[args.name].prices}")
    print(*files, sep="\n")


def listing() -> str:
    """Every set in two lines."""
    return "\n".join(
        f"{name:16}{one.source} (licence: {one.licence}){', for evaluation only' * one.evaluation_only}\n"
        f"{'':16}has {one.has}; lacks {one.lacks}; prices: {one.prices}"
        for name, one in SETS.items()
    )
