"""What routing replay costs and what it removes, on a small mixture of experts, in one run.

    python scripts/benchmark_replay.py --policy outputs/quickstart/moe-off-seed0/warm_start

Off, R2 and R3 train the same policy in turns, the order rotating, so that a slow moment of the machine hits all of
them. A step is a quarter of a rollout with its four optimiser steps: generation, old log-probs, updates, and the
audits of the routing every `routing_replay_metrics_steps` steps (in R2 and R3). Seconds are the process's own, so that
other processes do not count, and the ratio is the median of the turns' ratios to off. Then R3 is audited at every
rollout, at the weights that sampled.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmark_step import reward
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from routers.prompts import policy_prompt
from routers.table import quickstart_table
from srpo import SRPOConfig, SRPOTrainer
from srpo.tiny import tiny_moe_lm, train_tokenizer

UPDATES = 4
MODES = ("off", "R2", "R3")


class Stopwatch(TrainerCallback):
    """(wall, process) seconds of every whole rollout."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % UPDATES == 0:
            self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % UPDATES == 0:
            self.seconds.append((time.perf_counter() - self._start[0], time.process_time() - self._start[1]))


def policy(path: str | None, texts: Sequence[str]) -> tuple[Any, Any]:
    """A fresh policy and its tokenizer: a saved one, or random weights."""
    if path:
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32"), AutoTokenizer.from_pretrained(path)
    tokenizer = train_tokenizer(texts)
    return tiny_moe_lm(tokenizer), tokenizer


def train(mode: str, path: str | None, data: Dataset, rollouts: int, audits: int) -> tuple[Any, Stopwatch]:
    """A run of `rollouts` rollouts; its trainer and times."""
    with tempfile.TemporaryDirectory() as folder:
        config = SRPOConfig(
            output_dir=folder,
            objective="grpo",
            loss_type="minirl",
            epsilon_high=0.27,
            routing_replay=mode,
            routing_replay_metrics_steps=audits,
            router_aux_loss_coef=0.0,
            use_cpu=True,
            bf16=True,
            activation_checkpointing=False,
            num_generations=8,
            per_device_train_batch_size=32,
            steps_per_generation=UPDATES,
            max_completion_length=24,
            max_steps=UPDATES * rollouts,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            log_completions=False,
            disable_tqdm=True,
        )
        model, tokenizer = policy(path, [row[0]["content"] for row in data["prompt"]])
        trainer, watch = SRPOTrainer(model, reward, config, data, processing_class=tokenizer), Stopwatch()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.train()
    return trainer, watch


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the report that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="folder of a policy with experts; default: random weights")
    parser.add_argument("--rollouts", type=int, default=6, help="per turn; the first is warm-up")
    parser.add_argument("--turns", type=int, default=3, help="of every mode")
    parser.add_argument("--audits", type=int, default=10, help="routing_replay_metrics_steps of the timed runs")
    args = parser.parse_args(argv)
    table = quickstart_table()
    members = list(table.catalogue.values())
    data = Dataset.from_list([{"prompt": policy_prompt(row["query"], members)} for row in table.queries("train")])

    means: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for turn in range(args.turns):
        for mode in MODES[turn % 3 :] + MODES[: turn % 3]:
            _, watch = train(mode, args.policy, data, args.rollouts, args.audits)
            wall, own = zip(*watch.seconds[1:], strict=True)
            means[mode].append((statistics.fmean(wall) / UPDATES, statistics.fmean(own) / UPDATES))
            print(f"turn {turn + 1}: {mode} {means[mode][-1][1]:.3f} s a step", flush=True)
    lines = ["| routing_replay | seconds per step | wall | ratio to off |", "|---|--:|--:|--:|"]
    for mode, times in means.items():
        wall, own = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(a[1] / b[1] for a, b in zip(times, means["off"], strict=True))
        lines.append(f"| {mode} | {own:.3f} | {wall:.3f} | {ratio:.3f} |")

    def value(name: str) -> float:
        return statistics.fmean(e[f"router/{name}"] for e in audited.state.log_history if f"router/{name}" in e)

    audited, _ = train("R3", args.policy, data, args.rollouts, UPDATES)
    spec = audited.replay.spec
    size = len(spec.layers) * spec.top_k * 2
    lines += [
        "",
        f"{len(spec.layers)} MoE layers, {spec.top_k} of {spec.num_experts} experts: {size} bytes of routes per token",
        "",
        "At the weights that sampled (bf16 decoding with a cache, bf16 scoring of whole sequences):",
        f"flips {value('flip_rate'):.2%} of (token, layer), {value('slot_flip'):.2%} of slots, "
        f"{value('token_any_layer'):.2%} of tokens in some layer",
        f"k3 of sampler and trainer: native {value('kl_k3_native'):.2e}, replayed {value('kl_k3_replay'):.2e}",
    ]
    print("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
