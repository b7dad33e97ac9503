"""Native against replayed routing: runs of one recipe that differ in `routing_replay` and the seed, in one table.

    python scripts/benchmark_replay_runs.py outputs/quickstart/moe-*-seed*

Reads `recipe.yaml`, `trainer_state.json` and `evaluation.parquet` of each directory. A number is the mean over seeds
of a run's mean, with the 95 % interval of Student's t over the seeds (3 seeds: +- 2.48 standard deviations); the last
rows are differences of the same seed to the native run.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from routers.evaluation.episodes import Episodes
from srpo.cli import run as run_script
from srpo.strict_yaml import read_yaml

# 97.5 % quantiles of Student's t by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
LOGGED = {
    "mismatch k3 x 1e6": ("sampling/kl_k3", 1e6),
    "mean absolute dlogp x 1e3": ("sampling/logp_difference", 1e3),
    "F(1.05) %": ("sampling/outside_1.05", 100.0),
    "flips %": ("router/flip_rate", 100.0),
    "grad norm": ("grad_norm", 1.0),
}
CLIP = "clip_ratio/region_mean"


@dataclass(frozen=True)
class Run:
    """One finished run."""

    mode: str
    seed: int
    numbers: dict[str, float]


def read(folder: Path) -> Run:
    """A run's directory; FileNotFoundError or ValueError say what it lacks."""
    recipe = read_yaml(folder / "recipe.yaml")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    updates = recipe["steps_per_generation"] // recipe["gradient_accumulation_steps"]
    clips = [entry[CLIP] for entry in log if CLIP in entry]
    if recipe.get("logging_steps") != 1 or not clips or len(clips) % updates:
        raise ValueError(f"{folder}: needs logging_steps: 1 and whole rollouts of {updates} updates")
    clipped = [statistics.fmean(clips[place::updates]) for place in range(updates)]
    numbers = {f"clipped %, update {i + 1}": 100 * share for i, share in enumerate(clipped)}
    for name, (key, scale) in LOGGED.items():
        if values := [entry[key] for entry in log if key in entry]:
            numbers[name] = scale * statistics.fmean(values)
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    numbers["reward, last third"] = statistics.fmean(rewards[-max(len(rewards) // 3, 1) :])
    numbers["held-out reward"] = float(Episodes.read(folder).of(kind="policy").frame["reward"].mean())
    return Run(recipe["routing_replay"], recipe["seed"], numbers)


def interval(values: Sequence[float]) -> str:
    """Mean and its 95 % interval over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    half = T.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3g} [{mean - half:.3g}, {mean + half:.3g}]"


def table(runs: Sequence[Run]) -> str:
    """Markdown: one row per number, one column per mode, and the paired difference of each mode to `off`."""
    modes: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: (run.mode != "off", run.mode, run.seed)):
        modes[run.mode][run.seed] = run
    others = [mode for mode in modes if mode != "off" and "off" in modes]
    heads = [f"{mode} ({len(seeds)} seeds)" for mode, seeds in modes.items()] + [f"{m} minus off" for m in others]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name in dict.fromkeys(name for run in runs for name in run.numbers):
        of = {m: {s: r.numbers[name] for s, r in seeds.items() if name in r.numbers} for m, seeds in modes.items()}
        columns = [list(values.values()) for values in of.values()]
        columns += [[of[m][seed] - of["off"][seed] for seed in of[m] if seed in of["off"]] for m in others]
        lines.append(f"| {name} | " + " | ".join(interval(values) if values else "" for values in columns) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of srpo train")
    text = table([read(folder) for folder in parser.parse_args(argv).runs])
    print(text)
    return text


if __name__ == "__main__":
    run_script(main)
