"""Runs with an environment, in one process or by torchrun: python tests/support/rollout_cases.py FOLDER CASE...

Rows differ in how many turns they take, so that processes need different numbers of forwards.
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [*(str(TESTS / folder) for folder in ("support", "srpo", "routers")), str(TESTS.parent)]

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        # No weight stays gathered for its next use, as in models that are too large for it.
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",  # left out, DeepSpeed clips at 1, whatever max_grad_norm says
    "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    "zero_allow_untested_optimizer": True,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    # 20 rollouts in groups of four: the third group lies on both ranks, and loses one of its members.
    "lost": {"rollouts": 20, "lose": True},
    # The second batch is played while the first one trains, with rows that are lost and ranks that play differently.
    "ahead": {"rollouts": 20, "lose": True, "rollout_ahead": 1},
    "zero3": {},
    "zero3_sharded": {"ds3_gather_for_generation": False},
    # Failures are distilled; on the first rank decisions and texts, on the second texts only.
    "decisions": {"free": True},
    "zero3_decisions": {"free": True},
    # The second rank's episodes cannot be made: it has nothing to generate, to train on or to distil.
    "gone": {"gone": True},
    "gone_decisions": {"free": True, "gone": True},
    "zero3_gone": {"gone": True},
    "zero3_sharded_gone": {"ds3_gather_for_generation": False, "gone": True},
    "zero3_gone_decisions": {"free": True, "gone": True},
}
BOPO = {"objective": "bopo", "distill_failed": True, "advantage_baseline": "none", "advantage_scale": "none"}
import torch
from core_helpers import config, dataset, digest, model, trainer
from episode_worlds import ScriptedEnvironment
from safetensors.torch import save_file

from srpo.types import Observation


class Ragged(ScriptedEnvironment):
    """A row takes 1 to 4 turns.

    Args:
        lose: the third episode of every group fails at its end.
        gone: the n-th episode that is asked for cannot be made.
    """

    def __init__(self, lose: bool = False, gone: Callable[[int], bool] = lambda n: False):
        super().__init__(self.answer)
        self.lose = lose
        self.gone = gone

    def episode(self, row: Any, seed: str) -> Any:
        made = super().episode(row, seed)
        if self.gone(len(self.made) - 1):
            raise OSError("member small: connection refused")
        if self.lose and seed.endswith(":2"):
            step = made.step

            async def failing(text: str) -> Observation:
                observation = await step(text)
                if observation.end is not None:
                    raise OSError("member small: connection reset")
                return observation

            made.step = failing
        return made

    def answer(self, row: Any, t: int, text: str) -> Observation:
        if t == digest(row["query_id"]) % 4:
            return Observation(end="done")
        return Observation("go on " * (t + 1), before="<|im_end|>\n", after="<|im_start|>assistant\n")


class HalfFree(Ragged):
    """Every other turn, the first too, is a decision between two labels; but not in the episodes that are `free`."""

    def __init__(self, free: Callable[[int], bool], gone: Callable[[int], bool]):
        super().__init__(gone=gone)
        self.free = free

    def episode(self, row: Any, seed: str) -> Any:
        made = super().episode(row, seed)
        if not self.free(len(self.made) - 1):
            made._labels = lambda t: None if t % 2 else ("a", "b")
        return made


def reward(said: list[str], **_: Any) -> list[float]:
    return [float(digest(text) % 3 == 0) for text in said]


def untied() -> Any:
    """The tests' network with a head of its own, which ZeRO-3 gathers whenever it is read outside of its forward."""
    tied = model()
    config = type(tied.config)(**{**tied.config.to_dict(), "tie_word_embeddings": False})
    network = type(tied)(config)
    network.load_state_dict(tied.state_dict())
    return network


def run(folder: Path, case: str, processes: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights after two steps, and what was logged; forwards of this process."""
    settings = dict(CASES[case])
    size = settings.pop("rollouts", 16)
    lose, free, gone = (settings.pop(name, False) for name in ("lose", "free", "gone"))
    if case.startswith("zero3") and processes > 1:
        import deepspeed

        deepspeed.init_distributed("gloo", timeout=timedelta(seconds=240))  # ranks out of step: an error, not a hang
        settings["deepspeed"] = ZERO3
    args = config(
        folder / f"{case}_{processes}",
        **(BOPO if free else {"objective": "grpo"}),
        per_device_train_batch_size=size // processes,
        max_steps=2,
        learning_rate=1.0,
        max_completion_length=80,
        max_turn_tokens=8,
        **settings,
    )
    rank, half = int(os.environ.get("RANK", 0)), size // 2

    def second(n: int) -> bool:
        """Whether the n-th episode of this process is one of the second rank, or would be."""
        return rank == 1 or (n % size >= half and processes == 1)

    failing = second if gone else lambda n: False
    world = HalfFree(second, failing) if free else Ragged(lose, failing)
    network = untied() if free else model()
    made = trainer(args, network, reward, rollout_func=None, train_dataset=dataset(40), environment=world)
    assert made.accelerator.num_processes == processes, "this is not the number of processes that was asked for"
    forwards, make = [], made.sampler.make_generator

    def counted(*given: Any, **how: Any) -> Any:
        generator = make(*given, **how)
        finish = generator.finish

        def finished() -> None:
            own = generator.forwards
            finish()
            forwards.append((own, generator.forwards, generator._any_busy is not None))

        generator.finish = finished
        return generator

    made.sampler.make_generator = counted
    made.train()
    state = made.accelerator.get_state_dict(made.model_wrapped)
    kind = f"{made.accelerator.distributed_type.value}:{made._dist.zero_stage}"
    return {k: v.detach().clone().contiguous() for k, v in (state or {}).items()}, {
        "log": made.state.log_history,
        "forwards": forwards,
        "kind": kind,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    processes, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    for case in sys.argv[2:]:
        tensors, record = run(folder, case, processes)
        (folder / f"{case}_rank{rank}.json").write_text(json.dumps(record))
        save_file(tensors, folder / f"{case}_rank{rank}.st")


if __name__ == "__main__":
    main()
