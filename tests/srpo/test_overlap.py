"""rollout_ahead: 1: the next batch is played meanwhile, by the weights before, and is trained on as theirs."""

import asyncio
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from core_helpers import config, dataset, digest, distance, logged, model, trainer, weights
from episode_worlds import ScriptedEnvironment
from peft import LoraConfig
from trl.trainer.utils import RepeatSampler

from srpo.trainer.loss import sequences
from srpo.trainer.overlap import Ahead, refuse_ahead, rows_of_batch
from srpo.types import Observation

ROWS = 8
FRAME = {"before": "<|im_end|>\n", "after": "<|im_start|>assistant\n"}


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_rows_that_come_next_are_those_of_trl_s_sampler(shuffle):
    sampler = RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, shuffle=shuffle, seed=5)
    theirs = [index for _ in range(3) for index in sampler]  # epochs; the seventh row of each is left out
    for number in range(6):
        chunk = rows_of_batch(number, 7, 3, shuffle, 5)
        assert [i for i in chunk for _ in range(2)] * 2 == theirs[number * 12 : number * 12 + 12]


class Waiting(ScriptedEnvironment):
    """Batch n of training answers when n steps have begun: a rollout that has to end before them loses its rows."""

    def __init__(self, waits=True):
        super().__init__(lambda row, t, text: Observation(end="done") if t == 1 else Observation("go on", **FRAME))
        self.begun, self.waits = 0, waits

    def episode(self, row, seed):
        number = len(self.made) // ROWS
        made = super().episode(row, seed)
        step = made.step

        async def waiting(text):
            while self.waits and self.begun < number:
                await asyncio.sleep(0.005)
            return await step(text)

        made.step = waiting
        return made


def reward(said, **_):
    return [float(digest(text) % 3 == 0) for text in said]


def made(folder, world=None, **changes):
    settings = {"objective": "grpo", "max_steps": 4, "learning_rate": 1.0, "rollout_ahead": 1, "step_deadline": 60.0}
    peft = changes.pop("peft_config", None)
    args = config(
        folder,
        **{
            **settings,
            "per_device_train_batch_size": ROWS,
            "max_completion_length": 60,
            "max_turn_tokens": 6,
            **changes,
        },
    )
    world = Waiting() if world is None else world
    data = dataset(4)  # two batches an epoch: the run goes through two
    run = trainer(args, rewards=reward, rollout_func=None, train_dataset=data, environment=world, peft_config=peft)
    step = run.training_step

    def begins(*given, **named):
        world.begun += 1
        return step(*given, **named)

    run.training_step = begins
    return run


@pytest.mark.parametrize("objective", ["grpo", "srpo"])
def test_a_batch_is_played_while_the_one_before_trains_and_trained_on_as_its_sampler_s(
    tmp_path, monkeypatch, objective
):
    """No row is lost, though every world waits for a step; the old log-probs are those of the weights before it."""
    copies, begin = [], Ahead.begin

    def spied(self, current, *rest):
        begin(self, current, *rest)
        copies.append(weights(self.policy))
        assert distance(copies[-1], weights(current)) == 0

    monkeypatch.setattr(Ahead, "begin", spied)
    run = made(tmp_path, objective=objective, success_reward_threshold=0.5)
    seen, loss = [], run.compute_loss
    run.compute_loss = lambda network, inputs, *a, **k: (seen.append(dict(inputs)), loss(network, inputs, *a, **k))[1]
    run.train()
    assert logged(run, "rollout/dropped_share") == [0.0] * 4 and len(copies) == 3 and len(seen) == 4
    assert "old_per_token_logps" not in seen[0], "the first batch is sampled by the newest weights"
    assert all(distance(a, b) > 1e-3 for a, b in pairwise(copies))
    sampler = model()
    for copy, inputs in zip(copies, seen[1:], strict=True):
        sampler.load_state_dict(copy, strict=False)
        ids, attention, length = sequences(inputs)
        logits = sampler(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        logp = torch.log_softmax(logits, -1).gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
        assert mask.sum() > 20 and torch.allclose(logp[mask], inputs["old_per_token_logps"][mask], atol=1e-4)
    assert min(logged(run, "sampling/logp_difference")[-3:]) > 1e-4 and len(logged(run, "rollout/ahead_wait")) == 3
    assert all(torch.isfinite(value).all() for value in weights(run.model).values())


def test_a_run_that_is_resumed_goes_on_and_what_was_under_way_is_paid(tmp_path):
    run = made(tmp_path, Waiting(waits=False), save_strategy="steps", save_steps=2)
    run.train()
    world = Waiting(waits=False)
    again = made(tmp_path, world, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [e["step"] for e in again.state.log_history if "loss" in e] == [1, 2, 3, 4]
    # Three batches of 8 episodes and 2 steps were paid when the checkpoint was written, two are played after it.
    assert world.cents == 8 * 2 * (3 + 2)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_row_that_comes_twice_in_a_step_or_an_evaluation_draws_anew(tmp_path, ahead):
    """Both generation batches of a step are the same two rows; who plays ahead draws as who does not."""
    world, seeds = Waiting(waits=False), []
    episode = world.episode
    world.episode = lambda row, seed: (seeds.append(seed), episode(row, seed))[1]
    how = {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 1,
        "max_steps": 2,
        "learning_rate": 0.0,
        "top_k": 3,
    }
    run = made(tmp_path, world, **how, rollout_ahead=ahead, shuffle_dataset=False, per_device_eval_batch_size=4)
    run.train_dataset = dataset(2).select([0, 1, 0, 1])
    run.train()
    names = [f"q{row}:{sample}" for row in (0, 1) for sample in range(4)]
    assert seeds == [f"42:{step}.{part}:{name}" for step in (0, 1) for part in (0, 1) for name in names]
    texts = ["|".join(made.texts) for made in world.made]
    assert all(texts[i : i + 8] != texts[i + 8 : i + 16] for i in (0, 8, 16)), "at a learning rate of 0"
    assert len(logged(run, "sampling/logp_difference")) == 2 * ahead
    assert max(logged(run, "sampling/logp_difference"), default=0) < 1e-5, "the cut is not in the ratio"
    for _ in range(2):
        seeds.clear()
        run.evaluate(dataset(1).select([0, 0]))
        assert seeds == [f"42:eval-2.{part}:q0:{sample}" for part in (0, 1) for sample in range(4)]


def test_what_it_does_not_work_with_is_refused(tmp_path):
    fine = {"use_vllm": False, "routing_replay": "off"}
    refuse_ahead(SimpleNamespace(**fine), False, False, [])
    for changes, adapter, sharded, data, why in (
        ({"use_vllm": True}, False, False, [], "use_vllm"),
        ({"routing_replay": "R2"}, False, False, [], "routing_replay"),
        ({}, True, False, [], "adapter"),
        ({}, False, True, [], "ZeRO-3"),
        ({}, False, False, iter([]), "without a length"),
    ):
        with pytest.raises(ValueError, match=f"rollout_ahead: 1 does not work with .*{why}"):
            refuse_ahead(SimpleNamespace(**{**fine, **changes}), adapter, sharded, data)
    with pytest.raises(ValueError, match="does not work with an adapter"):
        made(tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="rollout_ahead=1 is read by the episodes of an environment only"):
        trainer(config(tmp_path, rollout_ahead=1))
