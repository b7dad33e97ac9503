"""4 + 4 steps are 8 with an environment, bit for bit: seeds are names, and the world's state is in the checkpoint."""

import json

import pytest
import torch
from core_helpers import config, dataset, digest, trainer, weights
from episode_worlds import ScriptedEnvironment

from srpo.run.whole import seal
from srpo.types import Observation


class Purse(ScriptedEnvironment):
    """What it says depends on what it has spent: a run that forgets its state goes another way."""

    def __init__(self):
        super().__init__(self.answer, lambda t: ["a", "b", "c"] if t == 0 else None)

    def answer(self, row, t, text):
        if t == 2:
            return Observation(end="done")
        return Observation(f"{row['query_id']} {self.before}", before="<|im_end|>\n", after="<|im_start|>assistant\n")

    def episode(self, row, seed):
        if len(self.made) % 8 == 0:
            self.before = self.cents  # of the batches before: steps of one batch end in any order
        return super().episode(row, seed)


def reward(said, **_):
    return [float(digest(text) % 3 == 0) for text in said]


def run(folder, resume=None, **changes):
    settings = {"objective": "grpo", "optim": "adamw_torch", "learning_rate": 3e-3, "max_steps": 8, **changes}
    args = config(
        folder,
        per_device_train_batch_size=8,
        max_completion_length=60,
        max_turn_tokens=6,
        save_strategy="steps",
        **{"save_steps": 4, **settings},
    )
    environment = Purse()
    made = trainer(args, rewards=reward, rollout_func=None, train_dataset=dataset(12), environment=environment)
    made.train(resume_from_checkpoint=resume)
    steps = {entry["step"]: entry["loss"] for entry in made.state.log_history if "loss" in entry}
    return weights(made.model), steps, environment.cents


@pytest.mark.parametrize(
    ("at", "changes"),
    [
        (4, {}),
        (4, {"objective": "srpo", "success_reward_threshold": 0.5}),
        (3, {"num_iterations": 2, "save_steps": 3}),  # inside a generation batch, with its choices
    ],
)
def test_resuming_is_bitwise(tmp_path, at, changes):
    straight, losses, cents = run(tmp_path, **changes)
    state = json.loads((tmp_path / f"checkpoint-{at}" / "environment_0.json").read_text())
    assert 0 < state["environment"]["cents"] < cents
    again, resumed, spent = run(tmp_path, resume=str(tmp_path / f"checkpoint-{at}"), **changes)
    assert resumed == losses and len(set(losses.values())) >= 5
    assert not [name for name in straight if not torch.equal(straight[name], again[name])]
    assert spent == cents


def test_a_checkpoint_without_an_environment_is_refused(tmp_path):
    run(tmp_path, max_steps=1, save_steps=1)
    (tmp_path / "checkpoint-1" / "environment_0.json").unlink()
    seal(tmp_path / "checkpoint-1")  # as a run without one would have
    with pytest.raises(FileNotFoundError, match="not written by a run with an environment"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-1"), max_steps=2)
