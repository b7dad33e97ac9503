"""Routing replay over several turns: rows of all turns, of what the world wrote too, and none of a lost trajectory."""

import torch
from core_helpers import logged, tokenizer
from replay_cases import Spy, agreement, made

from srpo.types import Observation

SETTINGS = {
    "loss_type": "minirl",
    "per_device_train_batch_size": 16,
    "steps_per_generation": 1,
    "num_iterations": 2,  # the same rows twice, so that two updates can be compared token by token
    "max_completion_length": 24,
    "max_turn_tokens": 4,
    "routing_replay_metrics_steps": 1,
    "max_lost_share": 1.0,
}


class Chat:
    """Free text, an answer of the world, a choice of two letters, another answer, free text."""

    def __init__(self, lost: bool):
        self.turn, self.lost = 0, lost

    def choices(self):
        return ["a", "b"] if self.turn == 1 else None

    async def step(self, text):
        self.turn += 1
        if self.lost and self.turn == 2:
            raise RuntimeError("planted")
        return Observation(body="red and blue " * self.turn, end="done" if self.turn == 3 else None)

    def columns(self, stop):
        return {"turn": self.turn}


class Chats:
    def __init__(self, lose: bool = False):
        self.lose, self.made = lose, 0

    def episode(self, row, seed):
        self.made += 1
        return Chat(self.lose and self.made % 5 == 0)

    def metrics(self):
        return {}

    def spent_usd(self):
        return 0.0

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def batches(run):
    """Every generation batch of the run, as the trainer got it."""
    seen, generate = [], run._generate_and_score_completions

    def watched(inputs):
        seen.append(generate(inputs))
        return seen[-1]

    run._generate_and_score_completions = watched
    return seen


def test_the_turns_of_an_environment_are_replayed(tmp_path):
    run = made(tmp_path, environment=Chats(), **SETTINGS)
    spy, seen = Spy(run), batches(run)
    run.train()
    # At the weights that sampled, in fp32, native routing is the recorded one: every row sits at its token.
    assert logged(run, "router/flip_rate")[0] == 0.0 and logged(run, "router/fallback_fraction")[0] == 0.0
    assert logged(run, "router/kl_k3_replay")[0] < 1e-6 and logged(run, "router/clip_replay")[0] == 0.0
    assert logged(run, "router/flip_rate")[1] > 0.05, "the weights have moved, and native routing with them"
    first, second = spy.seen["policy"][:2]
    tokens, same = agreement(first, second)
    assert tokens > 200 and same == tokens
    batch = seen[0]
    world = (batch["tool_mask"] == 0) & (batch["completion_mask"] == 1)
    assert world.any(), "the world wrote nothing"
    rows = batch["expert_ids"][:, -world.size(1) :]
    last = batch["completion_mask"].cumsum(1) == batch["completion_mask"].sum(1, keepdim=True)
    assert (rows[world & ~last] >= 0).all(), "tokens of the world are fed, so they have experts"
    assert batch["expert_ids"].dtype == torch.int16


def test_a_lost_trajectory_has_no_routes_and_trains_nothing(tmp_path):
    run = made(tmp_path, environment=Chats(lose=True), **SETTINGS)
    seen = batches(run)
    run.train()
    lost = (seen[0]["completion_mask"] * seen[0]["tool_mask"]).sum(dim=1) == 0
    assert 0 < lost.sum() < 16
    assert (seen[0]["expert_ids"][lost] == -1).all()
    assert (seen[0]["expert_ids"][~lost] >= 0).any(dim=(1, 2, 3)).all()
    assert logged(run, "router/fallback_fraction")[0] == 0.0, "lost rows do not count"


def test_r2_over_turns(tmp_path):
    run = made(tmp_path, environment=Chats(), routing_replay="R2", **SETTINGS)
    run.train()
    assert logged(run, "router/flip_rate")[0] == 0.0 and logged(run, "router/replay_bias")[0] == 0.0
    assert logged(run, "router/flip_rate")[1] > 0.05


def test_the_labels_are_single_tokens():
    assert all(len(tokenizer().encode(label, add_special_tokens=False)) == 1 for label in "ab")
