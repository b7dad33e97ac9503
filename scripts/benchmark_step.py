"""Seconds per training step beside TRL's own trainers: same model, prompts, sampling, rewards and batch, in one run.

    python scripts/benchmark_step.py --policy outputs/quickstart/srpo/start --steps 5 --repeats 2

Trainers take turns, so that a slow moment of the machine hits all of them; the table gives medians over all steps but
the first two of each turn, and ratios to TRL's GRPOTrainer. A step is generation, rewards, teacher, loss and update.
The policy should end its completions, such as the quickstart's start: a truncated one is never distilled. Rewards
are drawn from the text, 0.4 of them 1; the share of completions that were distilled is printed with every turn.
"""

import argparse
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.experimental.sdpo import SDPOConfig
from trl.experimental.sdpo import SDPOTrainer as TRLSDPOTrainer

from routers.data.table import quickstart_table
from routers.language.prompts import policy_prompt
from srpo import SRPOConfig, SRPOTrainer
from srpo.ranges import at_least, ranged

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "num_generations": 8,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 24,
    "learning_rate": 1e-6,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
# TRL's SDPO with the settings that are the defaults here; it always runs its teacher on every row.
TRL_SDPO = {
    "distillation_mode": "topk_logits",
    "distillation_topk": 100,
    "distillation_add_tail": True,
    "distillation_alpha": 0.5,
    "success_reward_threshold": 0.5,
    "distillation_weight": 1.0,
}


class Stopwatch(TrainerCallback):
    """Wall time of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for four in ten pairs of prompt and completion, by a checksum of the text."""
    pairs = zip(prompts, completions, strict=True)
    return [float(zlib.crc32(f"{p}{c}".encode()) % 10 < 4) for p, c in pairs]


def trainers(output: str, steps: int) -> dict[str, Callable[[Any, Any, Dataset], Any]]:
    """Name -> (model, tokenizer, data) -> trainer."""
    common = {**COMMON, "output_dir": output, "max_steps": steps}

    def ours(objective: str) -> Callable[[Any, Any, Dataset], Any]:
        config = SRPOConfig(**common, objective=objective, log_completions=False)
        return lambda model, tokenizer, data: SRPOTrainer(model, reward, config, data, processing_class=tokenizer)

    grpo, sdpo = GRPOConfig(**common, scale_rewards="none"), SDPOConfig(**common, **TRL_SDPO)
    return {
        "TRL GRPOTrainer": lambda m, t, d: TRLGRPOTrainer(m, reward, grpo, d, processing_class=t),
        "srpo grpo": ours("grpo"),
        "srpo srpo": ours("srpo"),
        "srpo sdpo": ours("sdpo"),
        "TRL SDPOTrainer": lambda m, t, d: TRLSDPOTrainer(m, reward, sdpo, d, processing_class=t),
    }


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the table that it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="folder of a policy of the quickstart's pool")
    steps = ranged(at_least(3), whole=True)
    parser.add_argument("--steps", type=steps, default=6, help="per turn; the first two are warm-up")
    parser.add_argument("--repeats", type=ranged(at_least(1), whole=True), default=3, help="turns of every trainer")
    args = parser.parse_args(argv)
    table = quickstart_table()
    members = list(table.catalogue.values())
    queries = [row["query"] for row in table.queries("train")]
    rows = [{"prompt": policy_prompt(query, members), "privileged_context": ""} for query in queries]
    data, seconds = Dataset.from_list(rows), {}
    with tempfile.TemporaryDirectory() as output:
        for turn in range(args.repeats):
            for name, make in trainers(output, args.steps).items():
                trainer, watch = make(args.policy, AutoTokenizer.from_pretrained(args.policy), data), Stopwatch()
                trainer.add_callback(watch)
                trainer.train()
                seconds.setdefault(name, []).extend(watch.seconds[2:])
                distilled = trainer.state.log_history[-1].get("srpo/distilled_share")
                share = "" if distilled is None else f", {distilled:.0%} distilled"
                median = statistics.median(watch.seconds[2:])
                print(f"turn {turn + 1}: {name} {median:.2f} s a step{share}", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians["TRL GRPOTrainer"]
    lines = ["| trainer | seconds per step | ratio to TRL GRPOTrainer |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {value / base:.2f} |" for name, value in medians.items()]
    print("\n".join(lines))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
