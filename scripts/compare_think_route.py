"""Put runs of think/route agents side by side, seeds of one recipe in one row, and draw their learning curves.

    python scripts/compare_think_route.py outputs/quickstart/think_route-seed* --markdown --plot learning.png

Reads each directory's `agent_evaluation.json` (and that of its warm start), and `completions/*.parquet` for the plot.
Intervals are bootstraps over seeds and questions.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from routers.agent_report import AGENT_EVALUATION, ANSWERER, AgentEvaluation, gains_text, seeds_table


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the text that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of scripts/train_think_route.py")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--plot", type=Path, help="write the learning curves to this PNG")
    args = parser.parse_args(argv)
    groups: dict[str, list[AgentEvaluation]] = defaultdict(list)
    starts: dict[str, list[AgentEvaluation]] = defaultdict(list)
    folders: dict[str, list[Path]] = defaultdict(list)
    for folder in args.runs:
        run = AgentEvaluation.read(folder)
        groups[run.policy.name].append(run)
        folders[run.policy.name].append(folder)
        if (folder / "warm_start" / AGENT_EVALUATION).exists():
            starts[run.policy.name].append(AgentEvaluation.read(folder / "warm_start"))
    first = next(iter(starts.values()), [])
    text = seeds_table({**groups, **({"warm start": first} if first else {})}, args.markdown)
    for name, runs in groups.items():
        if len(starts[name]) == len(runs):
            text += "\n\n" + gains_text(runs, starts[name])
    text += "\n\n" + ANSWERER
    print(text)
    if args.plot:
        draw_curves(folders, groups, first, args.plot)
    return text


def draw_curves(
    folders: dict[str, list[Path]],
    groups: dict[str, list[AgentEvaluation]],
    starts: Sequence[AgentEvaluation],
    path: Path,
) -> None:
    """Right answers while training, per seed, and held out before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, runs in folders.items():
        curves = [_right(run) for run in runs]
        for seed, values in enumerate(curves):
            smooth = values.rolling(5, min_periods=1).mean()
            axes.plot(smooth.index, smooth, linewidth=1.2, label=f"{name}, run {seed}: training (sampled)")
        last = max(int(values.index.max()) for values in curves)
        after = np.mean([np.mean(run.policy.values["em"]) for run in groups[name]])
        axes.scatter([last + 1], [after], marker="D", s=60, zorder=4, label=f"{name}: held out (greedy), {after:.1%}")
    if starts:
        before = np.mean([np.mean(start.policy.values["em"]) for start in starts])
        axes.scatter([0], [before], marker="s", s=60, zorder=4, label=f"warm start: held out (greedy), {before:.1%}")
    for line in next(iter(groups.values()))[0].lines:
        if line.kind in ("member", "baseline") and np.mean(line.values["em"]) > 0.3:
            axes.axhline(np.mean(line.values["em"]), color="#999999", linestyle="--", linewidth=1)
            axes.annotate(f"{line.name}, asked once", (0, np.mean(line.values["em"])), va="bottom", fontsize=8)
    axes.set_xlabel("step")
    axes.set_ylabel("exact match")
    axes.set_ylim(0, None)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)


def _right(folder: Path) -> "pd.Series[float]":
    """Share of right answers of each training step."""
    table = pd.concat([pd.read_parquet(file) for file in sorted((folder / "completions").glob("*.parquet"))])
    return table.groupby("step")["em"].mean()


if __name__ == "__main__":
    main()
