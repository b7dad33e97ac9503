"""Put runs of think/route agents side by side, seeds of one recipe in one row, and draw them in the plane of cost.

    python scripts/compare_think_route.py outputs/quickstart/think_route-seed* --markdown --plot think_route.png

Reads each directory's `agent_evaluation.json` and that of its warm start.
Intervals are bootstraps over seeds and questions.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from routers.evaluation.agent_report import AGENT_EVALUATION, ANSWERER, AgentEvaluation, Line, gains_text, seeds_table
from routers.evaluation.statistics import PER_QUERIES, estimate, resamples


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the text that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of scripts/train_think_route.py")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--plot", type=Path, help="write the plane of right answers and cost to this PNG")
    args = parser.parse_args(argv)
    groups: dict[str, list[AgentEvaluation]] = defaultdict(list)
    starts: dict[str, list[AgentEvaluation]] = defaultdict(list)
    for folder in args.runs:
        run = AgentEvaluation.read(folder)
        groups[run.policy.name].append(run)
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
        draw_plane(groups, first, args.plot)
    return text


def draw_plane(groups: dict[str, list[AgentEvaluation]], starts: Sequence[AgentEvaluation], path: Path) -> None:
    """Right answers against cost, held out: every seed before and after, and whoever is asked once."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    runs = [("warm start", start.policy, "s", "#0072B2") for start in starts]
    runs += [(name, run.policy, "D", "#D55E00") for name, group in groups.items() for run in group]
    labelled: set[str] = set()
    for name, line, marker, colour in runs:
        x, y = _point(line)
        draws = resamples(len(line.values["em"]))
        found = estimate(np.array(line.values["em"]), draws)
        axes.errorbar(x, y, yerr=[[y - found.low], [found.high - y]], color=colour, capsize=3, linewidth=1)
        axes.scatter(x, y, marker=marker, color=colour, s=55, zorder=3, label=None if name in labelled else name)
        labelled.add(name)
    for line in next(iter(groups.values()))[0].lines:
        if line.kind != "policy":
            x, y = _point(line)
            axes.scatter(x, y, color="#666666", marker="o" if line.kind == "member" else "^", s=45)
            axes.annotate(line.name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("cost, USD per 1,000 questions")
    axes.set_ylabel("exact match, held out")
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Grey: one member is asked once and its reply is the answer", loc="left", fontsize=10)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path)


def _point(line: Line) -> tuple[float, float]:
    return float(np.mean(line.values["cost"])) * PER_QUERIES, float(np.mean(line.values["em"]))
