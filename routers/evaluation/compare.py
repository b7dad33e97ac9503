"""Put finished runs side by side: one row per recipe, with the mean over its seeds, above members, random and oracle.

    srpo compare outputs/quickstart/*-seed*

Reads each directory's `evaluation.json` (and that of the warm start in it). Runs whose policies have one name are
seeds of one recipe; the 95 % intervals are bootstraps over seeds and queries.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from routers.evaluation.report import EVALUATION, Evaluation, compare_runs, render_comparison, render_gains


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of srpo train or srpo evaluate")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args(argv)
    folders = [run / "warm_start" for run in args.runs]
    try:
        runs = [Evaluation.read(run) for run in args.runs]
        starts = [Evaluation.read(folder) for folder in folders if (folder / EVALUATION).exists()]
        # Recipes that differ in the objective share their warm starts: each of them is one seed, once.
        distinct = {tuple(query["route"] for query in start.queries): start for start in starts}
        table = render_comparison(compare_runs([*runs, *distinct.values()]), runs[0].references, args.markdown)
        if len(starts) == len(runs):
            table += "\n\n" + render_gains(runs, starts)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(table)
    return table
