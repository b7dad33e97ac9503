"""Make a table of recorded replies out of a published routing data set, of any wide table, or of another such table.

srpo convert --list
srpo convert routellm_gsm8k RouteLLM/routellm/evals/gsm8k --output data/routellm/table.parquet
srpo train quickstart/srpo --table data/routellm/table.parquet

`sets` takes a table of recorded replies (or `quickstart`) and makes the one of its sets of members, `a+b`:

srpo convert sets quickstart --merger f_beta --output data/sets/table.parquet
srpo train quickstart/sets
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from routers.data.converters import SETS, convert
from routers.data.converters.sets import MERGERS, convert_sets
from srpo.cli import Parser
from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import above, at_least, between, ranged

OF_SETS = ("catalogue", "largest", "merger", "beta")


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
    parser.add_argument("--catalogue", metavar="PRICES", help="sets: of TABLE; default: the one beside it")
    parser.add_argument(
        "--largest", type=ranged(at_least(1), whole=True), metavar="N", help="sets: members of the largest (2)"
    )
    parser.add_argument("--merger", choices=MERGERS, help="sets: what a set earns (f_beta)")
    parser.add_argument("--beta", type=ranged(above(0)), metavar="B", help="sets: of f_beta (1)")
    parser.add_argument("--list", action="store_true", help="the sets, where they are from, what they have and lack")
    args = parser.parse_args(argv)
    if args.list:
        print(listing())
        return
    if None in (args.name, args.source, args.output):
        raise ValueError("give NAME, SOURCE and --output TABLE.parquet, or --list")
    if args.output.suffix != ".parquet":
        raise ValueError(f"--output {args.output}: its name must end in .parquet")
    if args.output.exists() and Path(args.source).exists() and args.output.samefile(args.source):
        raise ValueError(f"--output {args.output} is the source itself: name another file")
    given = {name: value for name in OF_SETS if (value := getattr(args, name)) is not None}
    if args.name == "sets":
        if args.members:
            raise ValueError("--members: sets are made of all members of a table; take it out")
        if "beta" in given and args.merger == "plurality":
            raise ValueError("--beta: is of --merger f_beta; take it out")
        converted, prices = convert_sets(args.source, **given, max_bad_share=args.max_bad_share), "USD per call"
    elif given:
        raise ValueError(f"--{next(iter(given))}: is of `srpo convert sets`, and {args.name} has none; take it out")
    else:
        converted = convert(args.name, args.source, args.members, args.max_bad_share)
        prices = SETS[args.name].prices
    files = converted.write(args.output)
    print(f"{args.name}: {converted.summary()}; prices: {prices}")
    print(*files, sep="\n")


def listing() -> str:
    """Every set in two lines."""
    published = "\n".join(
        f"{name:16}{one.source} (licence: {one.licence}){', for evaluation only' * one.evaluation_only}\n"
        f"{'':16}has {one.has}; lacks {one.lacks}; prices: {one.prices}"
        for name, one in SETS.items()
    )
    return f"{published}\n{'sets':16}a table of recorded replies, or quickstart: its sets of members, a+b"
