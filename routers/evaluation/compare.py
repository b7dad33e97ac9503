"""Put finished runs side by side: every recipe with its seeds, above one set of baselines, in one table.

    srpo compare outputs/quickstart/*-seed* --output outputs/comparison

Reads `evaluation.parquet` of each folder, of any task. Folders whose names differ only in `-seedN` are seeds of one
recipe. Intervals are bootstraps over seeds and items; differences are paired by both. With `--output` the report is
written too (report.html, report.md, frontier.png) and the merged evaluation.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from routers.evaluation.episodes import EPISODES, KINDS, Episodes
from srpo.cli import Parser

_SEED = re.compile(r"-seed(\d+)$")


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the tables that it printed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of srpo train or evaluate")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write a report there")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(argv)
    from routers.evaluation.report import report  # pandas and matplotlib, after a question for help
    from routers.evaluation.tables import render

    merged = compared({folder: Episodes.read(folder) for folder in options.runs})
    text = render(merged, "Comparison", options.markdown)
    print(text)
    if options.output:
        merged.write(options.output / EPISODES)
        report(merged, options.output, title="Comparison")
        print(options.output / "report.html")
    return text


def compared(runs: Mapping[Path, Episodes]) -> Episodes:
    """Runs as one evaluation: a policy is called after its folder, and its seed is the folder's.

    Raises:
        ValueError: two runs of one name and seed, or runs on other items or with other rewards.
    """
    from routers.evaluation.statistics import START_OF

    played, starts = [], []
    groups: dict[tuple[str, int], Path] = {}
    for folder, found in runs.items():
        name = folder.resolve().name
        numbered = _SEED.search(name)
        recipe, seed = (name[: numbered.start()], int(numbered[1])) if numbered else (name, 0)
        if (recipe, seed) in groups:
            raise ValueError(
                f"{groups[recipe, seed]} and {folder} have one name: call seeds of one recipe NAME-seed0, NAME-seed1, "
                "and other recipes otherwise"
            )
        groups[recipe, seed] = folder
        found = found.renamed(_renamed(recipe, [name for name, kind in found.routers.items() if kind == "policy"]))
        starts.append((recipe, _seeded(found.of(kind="start"), seed)))
        policy, others = found.of(kind="policy"), [kind for kind in KINDS if kind not in ("policy", "start")]
        played += [_seeded(policy, seed), found.of(kind=others)]
    try:
        begun = [Episodes.merged([start for _, start in starts])]
    except ValueError:  # recipes began from different policies
        begun = [start.renamed({n: START_OF.format(recipe, n[5:]) for n in start.routers}) for recipe, start in starts]
    first = [part for part in played if "policy" in part.routers.values()]
    return Episodes.merged([*first, *begun, *played])


def _renamed(recipe: str, names: Sequence[str]) -> dict[str, str]:
    """The policy of a run is called after its recipe; what follows a comma says how it was asked."""
    base = {name: name.partition(", ") for name in names}
    alone = len({first for first, _, _ in base.values()}) == 1
    return {name: f"{recipe}{comma}{how}" if alone else f"{recipe}: {name}" for name, (_, comma, how) in base.items()}


def _seeded(episodes: Episodes, seed: int) -> Episodes:
    """With the run's seed, but for repetitions within the run, which keep theirs."""
    several = episodes.frame["seed"].nunique() > 1
    return episodes if several else Episodes(episodes.frame.assign(seed=seed), episodes.header)
