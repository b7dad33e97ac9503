"""MiniRL against numbers worked by hand, against its limit (TRL's dr_grpo), and in the trainer that offers it."""

import math

import pytest
import torch
from core_helpers import binary_reward, config, distance, logged, model, trainer, weights

from srpo.objectives import minirl
from srpo.objectives.grpo import token_loss

NORMALISER = torch.tensor(8.0)  # two responses, fixed length 4


def logs(rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def gradient(**changes):
    """The two responses below, of which one entry may be changed; loss, d loss / d logp, metrics."""
    inputs = {
        "logp": logs([[0.6, 0.9], [0.3, 0.5]]).requires_grad_(),
        "old_logp": logs([[0.5, 0.5], [0.5, 0.25]]),
        "sampler_logp": logs([[0.4, 0.3], [0.5, 0.05]]),
        "advantages": torch.tensor([0.5, -0.5], dtype=torch.float64),
        "mask": torch.ones(2, 2),
        **changes,
    }
    output = minirl.surrogate(**inputs, normaliser=NORMALISER)
    output.loss.backward()
    return output.loss.item(), inputs["logp"].grad, {name: int(value) for name, value in output.tokens.items()}


def test_two_responses_by_hand():
    # token   pi    pi_old  r     A      M                         mu    pi/mu  weight   A * weight
    # 1, 1    0.6   0.5     1.2   +0.5   1 (1.2 <= 1.27)           0.4   1.5    1.5      +0.75
    # 1, 2    0.9   0.5     1.8   +0.5   0 (1.8 > 1.27)
    # 2, 1    0.3   0.5     0.6   -0.5   0 (0.6 < 0.8)
    # 2, 2    0.5   0.25    2.0   -0.5   1 (A < 0: no upper clip)  0.05  10     5 (cap)  -2.5
    loss, grad, metrics = gradient()
    assert loss == pytest.approx(-(0.75 * math.log(0.6) - 2.5 * math.log(0.5)) / 8, abs=1e-12)
    assert grad.tolist() == [[pytest.approx(-0.75 / 8, abs=1e-12), 0.0], [0.0, pytest.approx(2.5 / 8, abs=1e-12)]]
    assert metrics == {"tokens": 4, "clip_low": 1, "clip_high": 1, "truncated": 1}


def test_a_longer_response_does_not_weigh_its_tokens_down():
    """No 1/|y|: masking response 1's second token leaves the gradient of the first as it is."""
    _, grad, metrics = gradient(mask=torch.tensor([[1, 0], [1, 1]]))
    assert grad[0, 0].item() == pytest.approx(-0.75 / 8, abs=1e-12) and grad[0, 1].item() == 0.0
    assert metrics == {"tokens": 3, "clip_low": 1, "clip_high": 0, "truncated": 1}


def test_the_band_is_inclusive_and_one_sided():
    """r = 0.8 and r = 1.27 are kept; a negative advantage has no upper, a positive no lower limit."""
    old = torch.zeros(1, 4, dtype=torch.float64)
    logp = torch.tensor([[0.799, 0.8, 1.27, 1.271]], dtype=torch.float64).log()
    logp = torch.where(torch.tensor([[False, True, True, False]]), logp - torch.tensor([[0, -1e-12, 1e-12, 0]]), logp)
    for sign, kept in ((1.0, [True, True, True, False]), (-1.0, [False, True, True, True])):
        leaf = logp.clone().requires_grad_()
        advantages = torch.tensor([sign], dtype=torch.float64)
        minirl.surrogate(leaf, old, old, advantages, torch.ones(1, 4), normaliser=torch.tensor(1.0)).loss.backward()
        assert (leaf.grad != 0).tolist() == [kept]


def test_padding_may_hold_anything_and_a_lost_sampler_logp_means_pi_old():
    # 2, 2 without its mu: weight pi/pi_old = 2, so -1.0 instead of -2.5.
    sampler = logs([[0.4, 0.3], [0.5, 0.05]])
    sampler[1, 1] = torch.nan
    _, grad, metrics = gradient(sampler_logp=sampler)
    assert grad[1, 1].item() == pytest.approx(1.0 / 8, abs=1e-12) and metrics["truncated"] == 0
    wild = logs([[0.6, 0.9], [0.3, 0.5]])
    wild[0, 1] = torch.inf
    loss, grad, _ = gradient(logp=wild.requires_grad_(), mask=torch.tensor([[1, 0], [1, 1]]))
    assert math.isfinite(loss) and torch.isfinite(grad).all() and grad[0, 1] == 0


def test_with_the_sampler_equal_to_pi_old_the_gradient_is_dr_grpo_s():
    torch.manual_seed(0)
    old = torch.randn(6, 9, dtype=torch.float64) - 2
    logp = (old + 0.4 * torch.randn_like(old)).requires_grad_()
    advantages, mask = torch.randn(6, dtype=torch.float64), (torch.rand(6, 9) > 0.2).long()
    ours = minirl.surrogate(logp, old, old, advantages, mask, normaliser=torch.tensor(54.0))
    (grad,) = torch.autograd.grad(ours.loss, logp)
    surrogate = token_loss(logp, old, advantages, mask, epsilon_low=0.2, epsilon_high=0.27)  # bitwise TRL's
    (theirs,) = torch.autograd.grad((surrogate * mask).sum() / 54.0, logp)
    assert ours.tokens["clip_low"] > 0 and ours.tokens["clip_high"] > 0 and ours.tokens["truncated"] == 0
    assert torch.allclose(grad, theirs, rtol=1e-12, atol=1e-15) and grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------ in the trainer

SETTINGS = {
    "objective": "grpo",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "max_steps": 4,
    "learning_rate": 0.3,
    "epsilon_high": 0.27,
}


def run(folder, **changes):
    made = trainer(config(folder, **{**SETTINGS, **changes}), rollout_func=None, rewards=binary_reward)
    made.train()
    return made


def test_in_the_trainer_it_takes_dr_grpo_s_steps_where_the_engines_agree(tmp_path):
    """One engine in fp32 samples and trains, so that mu is pi_old up to the KV cache's rounding."""
    ours, theirs = run(tmp_path, loss_type="minirl"), run(tmp_path, loss_type="dr_grpo")
    start = weights(trainer(config(tmp_path)).model)
    moved = distance(start, weights(theirs.model))
    assert moved > 1e-3
    assert distance(weights(ours.model), weights(theirs.model)) < 1e-4 * moved
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "entropy", "reward")
    for name in names:
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4, abs=1e-6), name
    assert max(logged(ours, "clip_ratio/region_mean")) > 0, "nothing is clipped: the comparison is empty"
    assert max(logged(ours, "sampling/logp_difference")) < 1e-4 and max(logged(ours, "sampling/outside_1.05")) == 0


def test_the_split_into_micro_batches_does_not_matter(tmp_path):
    whole = run(tmp_path, loss_type="minirl", per_device_train_batch_size=16, steps_per_generation=1, max_steps=2)
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 4}
    parts = run(tmp_path, loss_type="minirl", max_steps=2, **cut)
    moved = distance(weights(trainer(config(tmp_path)).model), weights(whole.model))
    assert distance(weights(whole.model), weights(parts.model)) < 1e-5 * moved and moved > 1e-3


def test_a_mismatch_of_the_sampler_reaches_weights_and_metrics(tmp_path):
    """Sampler log-probs shifted by log 2: every weight doubles, so plain SGD moves twice as far; k1 = log 2."""
    from core_helpers import scripted

    def rollouts(prompts, made, shift):
        answer = scripted(prompts, made)
        made.model.eval()
        answer["logprobs"] = []
        for prompt, ids in zip(answer["prompt_ids"], answer["completion_ids"], strict=True):
            logits = made.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            logp = torch.log_softmax(logits / made.temperature, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            answer["logprobs"].append((logp.detach() + shift).tolist())
        made.model.train()
        return answer

    ends, made = [], None
    args = {**SETTINGS, "loss_type": "minirl", "max_steps": 1, "learning_rate": 1e-2}
    start = weights(trainer(config(tmp_path)).model)
    for shift in (0.0, -math.log(2)):
        made = trainer(config(tmp_path, **args), rollout_func=lambda p, t, shift=shift: rollouts(p, t, shift))
        made.train()
        ends.append({name: value - start[name] for name, value in weights(made.model).items()})
    assert distance({name: 2 * value for name, value in ends[0].items()}, ends[1]) < 1e-3 * distance(ends[0], ends[1])
    assert logged(made, "sampling/kl_k1")[0] == pytest.approx(-math.log(2), abs=1e-4)
    assert logged(made, "sampling/kl_k3")[0] == pytest.approx(1 - math.log(2), abs=1e-4)
    assert logged(made, "sampling/outside_1.05")[0] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_rewards": "group"}, r"scale_rewards='group' is not part of loss_type: minirl"),
        ({"beta": 0.1}, r"beta=0.1 is not part"),
        ({"minirl_cap": 0.0}, r"minirl_cap=0.0"),
        ({"importance_sampling_level": "sequence"}, r"importance_sampling_level"),
        ({"objective": "srpo"}, r"loss_type='minirl' acts inside"),
    ],
)
def test_settings_that_contradict(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{"objective": "grpo", "loss_type": "minirl", **changes})


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_a_checkpoint_that_names_no_cache_is_scored_like_any_other(tmp_path, where):
    """On a20621b each token got the log-prob of the row's first one: 86 % of the tokens were off by more than 5 %."""
    network = model()
    (network.config if where == "config" else network.generation_config).use_cache = False
    made = trainer(config(tmp_path, **{**SETTINGS, "max_steps": 2}, loss_type="minirl"), network, rollout_func=None)
    made.train()
    assert logged(made, "sampling/outside_1.05")[0] == 0.0
    assert logged(made, "sampling/logp_difference")[0] < 1e-4


def test_continuous_batching_returns_no_log_probs_to_weigh_by(tmp_path):
    with pytest.raises(ValueError, match="continuous batching does not return"):
        config(tmp_path, **SETTINGS, loss_type="minirl", use_transformers_continuous_batching=True)
