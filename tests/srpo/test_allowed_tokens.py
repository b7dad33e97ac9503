"""Completions of one turn among allowed ids: the sampling and every scored log-probability know the same mask."""

import math

import pytest
import torch
from core_helpers import by_prefix, config, dataset, logged, model, tokenizer, trainer
from peft import LoraConfig

NAMES = ("small", "smart")  # they begin alike
END = tokenizer().eos_token_id
SPELLED = [[*tokenizer()(name, add_special_tokens=False)["input_ids"], END] for name in NAMES]


class Names:
    """A completion is one of the names."""

    def after(self, ids):
        found = {path[len(ids)] for path in SPELLED if path[: len(ids)] == list(ids) and len(path) > len(ids)}
        return tuple(sorted(found)) or None

    def __call__(self, ids):
        return [self.after(ids[:t]) for t in range(len(ids))]

    def state(self):
        return by_prefix(self.after)


def reward(completion_ids, **_):
    return [float(ids == SPELLED[0]) for ids in completion_ids]


def made(folder, **changes):
    settings = {"num_iterations": 2, "max_completion_length": max(map(len, SPELLED)), **changes}
    lora = LoraConfig(r=4, target_modules="all-linear") if settings.pop("lora", False) else None
    return trainer(
        config(folder, **settings),
        model(scale=2.0),
        reward,
        rollout_func=None,
        allowed_tokens=Names(),
        peft_config=lora,
    )


def scored(built):
    built.current_gradient_accumulation_steps = 1
    built.model.train()
    return built._generate_and_score_completions([row for row in dataset().select(range(4)) for _ in range(4)])


@pytest.mark.parametrize("lora", [False, True])
def test_every_pass_renormalises_over_the_same_ids(tmp_path, lora):
    built = made(tmp_path, beta=0.1, lora=lora)
    batch = scored(built)
    mask, old = batch["completion_mask"].bool(), batch["old_per_token_logps"]
    completions = [ids[m].tolist() for ids, m in zip(batch["completion_ids"], mask, strict=True)]
    assert {tuple(ids) for ids in completions} == {tuple(path) for path in SPELLED}, "nothing but a name"
    whole = [(old[i] * mask[i]).sum().exp().item() for i in range(16)]
    both = 0
    for group in range(0, 16, 4):
        of = {tuple(completions[i]): whole[i] for i in range(group, group + 4)}
        both += len(of) == 2
        assert len(of) < 2 or sum(of.values()) == pytest.approx(1.0, abs=1e-6), "the names' probabilities sum to 1"
    assert both > 0
    certain = (batch["choices"] >= 0).sum(-1) == 1
    assert (certain & mask).any() and old[certain & mask].abs().max() == 0.0
    with built._among(built.model, batch["choices"], None):
        new = built.loss.forward(built.model, batch, batch["completion_mask"])[0]
    assert torch.equal(new[mask], old[mask]), "the ratio of step one is exactly 1"
    assert (batch["ref_per_token_logps"][mask] - old[mask]).abs().max() < 1e-5


def test_a_run_learns_and_is_evaluated_among_the_names(tmp_path):
    built = made(tmp_path, max_steps=6)
    built.train()
    assert logged(built, "is_ratio")[0] == 1.0
    assert max(logged(built, "entropy")) <= math.log(2) and max(logged(built, "srpo/teacher_entropy")) <= math.log(2)
    assert max(logged(built, "srpo/distilled_share")) > 0 and max(logged(built, "grad_norm")) > 0
    assert built.evaluate(dataset(4))["eval_completions/clipped_ratio"] == 0.0


@pytest.mark.parametrize("lora", [False, True])
def test_log_probs_of_the_sampling_pass_know_the_mask(tmp_path, lora):
    built = made(tmp_path, objective="grpo", loss_type="minirl", max_steps=2, lora=lora)
    built.train()
    assert max(logged(built, "sampling/logp_difference")) < 1e-5 and max(logged(built, "sampling/outside_1.05")) == 0


def test_what_cannot_be_restricted_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_transformers_continuous_batching: false"):
        made(tmp_path, use_transformers_continuous_batching=True)
