"""Run recipes side by side over several seeds and put them into one table, with the members they have to beat.

    python scripts/compare.py --recipes recipes/quickstart/{grpo,sdpo,srpo}.yaml --seeds 0 1 2 --output outputs/compare

Every run is `scripts/train.py` in a process of its own, in `OUTPUT/<recipe>/seed-<n>`; a run that is already there is
not repeated. Intervals come from a bootstrap that draws seeds and queries. Writes `comparison.md` and `comparison.json`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from routers.evaluation import Estimate, SeedSummary, summarise_seeds
from routers.report import EVALUATION, Evaluation

TRAIN = Path(__file__).resolve().parent / "train.py"
COLUMNS = ("", "accuracy", "95 % interval", "$ / 1k queries", "reward", "95 % interval", "reward per seed")


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; one thread each if more than one")
    args, overrides = parser.parse_known_args(argv)
    folders = {(r, s): args.output / r.stem / f"seed-{s}" for r in args.recipes for s in args.seeds}

    def run(job: tuple[Path, int]) -> None:
        if not (folders[job] / EVALUATION).exists():
            _train(*job, folders[job], args.jobs, overrides)
        print(f"done: {folders[job]}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, folders))

    runs = {r.stem: [Evaluation.read(folders[r, s]) for s in args.seeds] for r in args.recipes}
    starts = [folder / "warm_start" for (recipe, _), folder in folders.items() if recipe == args.recipes[0]]
    if all((start / EVALUATION).exists() for start in starts):
        runs = {"warm start": [Evaluation.read(start) for start in starts], **runs}
    summaries = {name: summarise_seeds([run.values() for run in seeds]) for name, seeds in runs.items()}
    table = _table(summaries, next(iter(runs.values()))[0])
    (args.output / "comparison.md").write_text(table + "\n", encoding="utf-8")
    content = {name: asdict(summary) for name, summary in summaries.items()}
    (args.output / "comparison.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table)
    return table


def _train(recipe: Path, seed: int, folder: Path, jobs: int, overrides: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), "--config", str(recipe), "--seed", str(seed), "--output_dir", str(folder)]
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        done = subprocess.run([*command, *overrides], stdout=log, stderr=log, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}; see {folder / 'log.txt'}")


def _table(summaries: dict[str, SeedSummary], reference: Evaluation) -> str:
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for name, summary in summaries.items():
        means, seeds = summary.estimates, ", ".join(f"{value:.3f}" for value in summary.per_seed["reward"])
        rows.append(_row(f"**{name}**", means["correct"], means["cost"], means["reward"], seeds))
    for entry in reference.references:
        rows.append(_row(entry.name, entry.accuracy, entry.cost, entry.reward, ""))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, accuracy: Estimate, cost: Estimate, reward: Estimate, seeds: str) -> tuple[str, ...]:
    return (
        name,
        f"{accuracy.value:.1%}",
        f"[{accuracy.low:.1%}, {accuracy.high:.1%}]",
        f"{cost.value:.4f}",
        f"{reward.value:.3f}",
        f"[{reward.low:.3f}, {reward.high:.3f}]",
        seeds,
    )


if __name__ == "__main__":
    main()
