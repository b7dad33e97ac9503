"""Groups that hold each alternative: what they hold, what is logged of them, and the gradient, which is that of the
expected reward."""

import math

import pandas as pd
import pytest
import torch
from core_helpers import by_prefix, config, dataset, logged, model, tokenizer, trainer

from srpo.objectives.advantages import importance_weighted
from srpo.rollout.constrained import OneOf
from srpo.rollout.each_of import EachOf
from srpo.rollout.turns import Request

NAMES = ("small", "smart", "large")  # two begin alike
WORTH = {"small": 0.2, "smart": 1.0, "large": 0.4}
OPENING, CLOSING = "<route>", "</route>"
OPENED = tokenizer()(OPENING, add_special_tokens=False)["input_ids"]
THOUGHTS = (5, 6)


class Turn(EachOf):
    """A token of the policy's own, then the tag, which a model that has learned nothing would never write."""

    def after(self, ids):
        if not ids:
            return THOUGHTS
        if len(ids) <= len(OPENED):
            return (OPENED[len(ids) - 1],)
        return OneOf.state(self, ids).allowed or (tokenizer().eos_token_id,)

    def __call__(self, ids):
        return [self.after(ids[:t]) for t in range(len(ids))]

    def state(self):
        return by_prefix(self.after)


def mask():
    return Turn(tokenizer(), OPENING, NAMES, [CLOSING])


def named(text):
    return next((name for name in NAMES if f"{OPENING}{name}{CLOSING}" in text), None)


def reward(completions, **_):
    return [WORTH.get(named(c if isinstance(c, str) else c[0]["content"]), -1.0) for c in completions]


def made(folder, allowed=None, **changes):
    size = changes.setdefault("num_generations", 6)
    settings = {"objective": "grpo", "loss_type": "dapo", "max_completion_length": 40, **changes}
    settings = {"per_device_train_batch_size": 4 * size, "log_completions": True, **settings}
    allowed = allowed or mask()
    return trainer(config(folder, **settings), model(scale=2.0), reward, rollout_func=None, allowed_tokens=allowed)


def scored(built, groups=4):
    built.current_gradient_accumulation_steps = 1
    built.model.train()
    size = built.num_generations
    return built._generate_and_score_completions([row for row in dataset().select(range(groups)) for _ in range(size)])


def completions(batch):
    rows = zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    return [ids[kept].tolist() for ids, kept in rows]


def log_prob(network, batch, row):
    """Of a completion, under the mask, by plain forwards."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    ids = completions(batch)[row]
    logits = network(torch.cat([prompt, torch.tensor(ids)])[None]).logits[0, len(prompt) - 1 : -1]
    total = logits.new_zeros(())
    for t, allowed in enumerate(mask()(ids)):
        among = logits[t, list(allowed)].log_softmax(-1)
        total = total + among[list(allowed).index(ids[t])]
    return total


def test_a_group_holds_each_once_after_each_thought(tmp_path):
    built = made(tmp_path)
    batch = scored(built)
    texts = [built._tokenizer.decode(ids, skip_special_tokens=True) for ids in completions(batch)]
    assert [named(text) for text in texts] == list(NAMES) * 8
    assert all(ids[-1] == tokenizer().eos_token_id for ids in completions(batch))
    firsts = [ids[0] for ids in completions(batch)]
    assert all(len({*firsts[row : row + 3]}) == 1 for row in range(0, 24, 3))
    assert any(len({*firsts[row : row + 6]}) == 2 for row in range(0, 24, 6)), "thoughts are drawn anew"
    importance = built.generation_step.importance
    assert importance.view(8, 3).mean(dim=1).tolist() == pytest.approx([1.0] * 8)
    for i in range(24):  # what is left of a completion's probability is its thought's
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        logits = built.model(prompt[None]).logits[0, -1, list(THOUGHTS)]
        thought = logits.log_softmax(-1)[THOUGHTS.index(firsts[i])]
        whole = thought + (importance[i] / 3).log()
        assert log_prob(built.model, batch, i).item() == pytest.approx(whole.item(), abs=1e-5)


def test_the_gradient_is_that_of_the_expected_reward(tmp_path):
    """Of the members, after each thought that was drawn; a thought's is the policy gradient with the group's mean."""
    built = made(tmp_path)
    batch = scored(built)
    built.compute_loss(built.model, batch).backward()
    found = {name: p.grad.clone() for name, p in built.model.named_parameters()}
    built.model.zero_grad()
    expected = torch.zeros(())
    for group in range(0, 24, 6):
        logs = torch.stack([log_prob(built.model, batch, i) for i in range(group, group + 6)]).view(2, 3)
        value = (logs.softmax(-1) * torch.tensor([WORTH[name] for name in NAMES])).sum(-1)
        better = (value - value.mean()).detach()
        expected = expected + (value + better * logs.logsumexp(-1)).sum()
    (-3 * expected / batch["completion_mask"].sum()).backward()
    for name, p in built.model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-8, name
    assert max(p.grad.norm() for p in built.model.parameters()) > 1e-4


def test_a_group_of_any_size_is_weighted_by_how_often_it_holds_each(tmp_path):
    """8 rows, 3 names: two thoughts, and the first two rows' names once more; the gradient is that of 6 rows."""
    built = made(tmp_path, num_generations=8)
    batch = scored(built)
    texts = [built._tokenizer.decode(ids, skip_special_tokens=True) for ids in completions(batch)]
    assert [named(text) for text in texts[:8]] == [*NAMES, *NAMES, "small", "smart"]
    weights = built.generation_step.importance.view(4, 8)
    assert weights.mean(dim=1).tolist() == pytest.approx([1.0] * 4)
    # a thought's rows: 0 1 2 with 6, which is small again, and 3 4 5 with 7, which is smart again
    for once, again in ((0, 6), (4, 7)):
        assert torch.equal(weights[:, once], weights[:, again])
        for group in range(0, 32, 8):
            assert completions(batch)[group + once] == completions(batch)[group + again]
    first = torch.stack([2 * weights[:, 0], weights[:, 1], weights[:, 2]], dim=1)
    wanted = torch.stack([torch.stack([log_prob(built.model, batch, 8 * g + n) for n in range(3)]) for g in range(4)])
    assert torch.allclose(first / 4, wanted.softmax(dim=1), atol=1e-5)


def test_it_learns_and_what_is_logged_is_the_policys(tmp_path):
    built = made(tmp_path, max_steps=12, learning_rate=2.0)
    built.train()
    rewards = logged(built, "reward")
    assert rewards[0] < 0.9 and rewards[-1] > 0.95, rewards  # the mean over the names would stay 0.533
    assert logged(built, "rewards/reward/mean") == pytest.approx(rewards)
    assert logged(built, "reward_std")[-1] < logged(built, "reward_std")[0]


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_table_says_how_much_a_completion_counts(tmp_path, evaluated):
    """TRL keeps the last batch: after an evaluation that is its, which is drawn."""
    how = {"max_completion_length": 40, "num_generations": 6, "per_device_train_batch_size": 24}
    how |= {"per_device_eval_batch_size": 6, "log_completions": True}
    how |= {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2} if evaluated else {}
    args = config(tmp_path, objective="grpo", loss_type="dapo", max_steps=2, **how)
    held_out = dataset(4) if evaluated else None
    built = trainer(args, model(scale=2.0), reward, rollout_func=None, allowed_tokens=mask(), eval_dataset=held_out)
    built.train()
    parts = [pd.read_parquet(path) for path in sorted((tmp_path / "completions").glob("*.parquet"))]
    assert len(parts) == 2 and all(len(part) == 24 for part in parts)
    for part in parts:
        weights = part["importance_weight"]
        assert weights.isna().all() if evaluated else weights.sum() == pytest.approx(24, rel=1e-5)


def test_by_hand():
    w, r = torch.tensor([3 * 0.5, 3 * 0.25, 3 * 0.25]), torch.tensor([1.0, 0.0, 2.0])
    assert importance_weighted(r, w, 3).tolist() == pytest.approx([0.0, -0.75, 0.75])
    lost = importance_weighted(torch.cat([r, torch.tensor([1.0, math.nan, 2.0])]), torch.cat([w, w]), 3)
    assert lost.tolist() == pytest.approx([0.0, -0.75, 0.75, 0.0, 0.0, 0.0])


def test_processes_that_share_a_group_make_what_one_makes(tmp_path):
    built, each = made(tmp_path), mask()
    generator = built.sampler.make_generator(built.model, [tokenizer().eos_token_id], allowed=each.state())

    def asked(rows):
        prompts = {group: tuple(tokenizer()(f"say {group}")["input_ids"]) for group in range(2)}
        places = [each.place(row, 8) for row in rows]
        requests = [Request(i, prompts[p[0]], f"{p[:2]}", 40) for i, p in enumerate(places)]
        samples, importance = each.completions(generator, requests, rows[0], 8)
        return [sample.ids for sample in samples], importance

    ids, importance = asked(range(16))
    assert len({*ids}) >= 6 and sum(importance) == pytest.approx(16)
    for start, end in ((0, 5), (5, 10), (10, 16)):
        some, weights = asked(range(start, end))
        assert some == ids[start:end] and weights == pytest.approx(importance[start:end])


class Mute(Turn):
    def after(self, ids):
        return THOUGHTS if len(ids) < 3 else (tokenizer().eos_token_id,)


def test_a_turn_that_names_nobody_is_each_of_its_rows(tmp_path):
    built = made(tmp_path, allowed=Mute(tokenizer(), OPENING, NAMES, [CLOSING]))
    batch = scored(built)
    assert built.generation_step.importance.tolist() == [1.0] * 24
    assert batch["advantages"].tolist() == [0.0] * 24


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_generations": 5, "per_device_train_batch_size": 20}, "set num_generations: 6, or more"),
        ({"num_generations": 3}, "set num_generations: 6, or more"),
        ({"objective": "srpo"}, "set objective: grpo"),
        ({"beta": 0.1}, "set beta: 0.0"),
        ({"scale_rewards": "group"}, "set scale_rewards: none"),
        ({"loss_type": "minirl"}, "set loss_type: dapo"),
    ],
)
def test_what_reads_draws_of_the_policy_is_refused(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        made(tmp_path, **change)
