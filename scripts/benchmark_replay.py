"""What routing replay costs and what it removes, on a small mixture of experts, in one run.

    python scripts/benchmark_replay.py --policy outputs/quickstart/moe-off-seed0/start

Off, R2 and R3 train the same policy in one process, a rollout each in turn, so that a slow moment of the machine hits
all of them. A step is a quarter of a rollout with its four optimiser steps: generation, old log-probs, updates, and
the audits of the routing every `routing_replay_metrics_steps` steps (in R2 and R3). Seconds are those of the thread,
so that other work of the machine does not count. The ratio is that of the sums over all rollouts but the first; beside
it the quartiles of the ratios of neighbouring rollouts. The audits of R3 at the first update after a rollout, at the
weights that sampled, give flips and k3.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmark_step import right_in_ten
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from routers.data.table import quickstart_table
from routers.language.prompts import policy_prompt
from srpo import SRPOConfig, SRPOTrainer
from srpo.ranges import at_least, ranged
from srpo.scratch_lm import tiny_moe_lm, train_tokenizer

UPDATES = 4
MODES = ("off", "R2", "R3")


class Turns(TrainerCallback):
    """Lets its trainer run for one rollout after `mine` was released, then releases `after`; keeps the times."""

    def __init__(self, mine: threading.Semaphore, after: threading.Semaphore) -> None:
        self.mine, self.after = mine, after
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % UPDATES == 0:
            if not self.mine.acquire(timeout=3600):  # another trainer has failed, and will be reported
                raise TimeoutError("no turn within an hour")
            self._start = time.thread_time()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % UPDATES == 0:  # transformers has counted the step already
            self.seconds.append(time.thread_time() - self._start)
            self.after.release()


def policy(path: str | None, texts: Sequence[str]) -> tuple[Any, Any]:
    """A fresh policy and its tokenizer: a saved one, or random weights."""
    if path:
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32"), AutoTokenizer.from_pretrained(path)
    tokenizer = train_tokenizer(texts)
    return tiny_moe_lm(tokenizer), tokenizer


def make(mode: str, path: str | None, data: Dataset, rollouts: int, audits: int, folder: str) -> Any:
    """A trainer of `rollouts` rollouts."""
    config = SRPOConfig(
        output_dir=f"{folder}/{mode}",
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
    trainer = SRPOTrainer(model, right_in_ten(4), config, data, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the report that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="folder of a policy with experts; default: random weights")
    rollouts, steps = ranged(at_least(2), whole=True), ranged(at_least(0), whole=True)
    parser.add_argument("--rollouts", type=rollouts, default=12, help="of every mode; the first is warm-up")
    parser.add_argument("--audits", type=steps, default=10, help="routing_replay_metrics_steps")
    args = parser.parse_args(argv)
    table = quickstart_table()
    members = list(table.catalogue.values())
    data = Dataset.from_list([{"prompt": policy_prompt(row["query"], members)} for row in table.queries("train")])

    gates = [threading.Semaphore(int(i == 0)) for i in range(len(MODES))]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [make(mode, args.policy, data, args.rollouts, args.audits, folder) for mode in MODES]
        turns = [Turns(gate, gates[(i + 1) % len(gates)]) for i, gate in enumerate(gates)]
        with ThreadPoolExecutor(len(MODES)) as pool:
            for trainer, turn in zip(trainers, turns, strict=True):
                trainer.add_callback(turn)
            for done in [pool.submit(trainer.train) for trainer in trainers]:
                done.result()
    times = {mode: turn.seconds[1:] for mode, turn in zip(MODES, turns, strict=True)}
    lines = ["| routing_replay | CPU seconds per step | ratio to off | quartiles |", "|---|--:|--:|--:|"]
    for mode, seconds in times.items():
        ratios = [mine / off for mine, off in zip(seconds, times["off"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ratio = sum(seconds) / sum(times["off"])
        lines.append(f"| {mode} | {statistics.fmean(seconds) / UPDATES:.3f} | {ratio:.3f} | {low:.3f} to {high:.3f} |")

    replayed = trainers[MODES.index("R3")]
    fresh = [e for e in replayed.state.log_history if "router/flip_rate" in e and e["step"] % UPDATES == 1]

    def value(name: str) -> float:
        return statistics.fmean(entry[f"router/{name}"] for entry in fresh)

    spec = replayed.replay.spec
    size = len(spec.layers) * spec.top_k * 2
    lines += [
        "",
        f"{len(spec.layers)} MoE layers, {spec.top_k} of {spec.num_experts} experts: {size} bytes of routes per token",
        "",
        f"{len(fresh)} audits at the weights that sampled (bf16: decoding with a cache against whole sequences):",
        f"flips {value('flip_rate'):.2%} of (token, layer), {value('slot_flip'):.2%} of slots, "
        f"{value('token_any_layer'):.2%} of tokens in some layer",
        f"k3 of sampler and trainer: native {value('kl_k3_native'):.2e}, replayed {value('kl_k3_replay'):.2e}",
    ]
    print("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
