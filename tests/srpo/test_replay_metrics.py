"""Audits and mismatch by hand; alarms that speak on what they are for, and not otherwise."""

import math
import re

import pytest
import torch

from srpo.replay.expert_table import RouterSpec
from srpo.replay.metrics import ReplayAlarms, audit
from srpo.rollout.sampler_logprobs import SampledLogProbs, mismatch_metrics, mismatch_sums

SPEC = RouterSpec(layers=(1, 3), num_layers=4, top_k=2, num_experts=8)
CLIP = (0.2, 0.27)


def test_mismatch_by_hand():
    # pi/mu = 2, 1/2, 1.04 and a token without a log-prob; the last column is padding.
    ratio = torch.tensor([[2.0, 0.5, 1.04, 9.0, 9.0]], dtype=torch.float64)
    sampler = torch.full((1, 5), -1.0, dtype=torch.float64)
    logp = sampler + ratio.log()
    sampler[0, 3] = torch.nan
    found = mismatch_metrics(mismatch_sums(sampler, logp, torch.tensor([[1, 1, 1, 1, 0]])))
    assert found["kl_k1"] == pytest.approx(-math.log(1.04) / 3, abs=1e-12)  # -(ln 2 - ln 2 + ln 1.04) / 3
    k3 = (2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)) + (1.04 - 1 - math.log(1.04))
    assert found["kl_k3"] == pytest.approx(k3 / 3, abs=1e-12)
    assert found["logp_difference"] == pytest.approx((2 * math.log(2) + math.log(1.04)) / 3, abs=1e-12)
    assert found["outside_1.05"] == pytest.approx(2 / 3) and found["outside_2.0"] == 0.0  # not beyond 2, but at it
    assert mismatch_metrics(mismatch_sums(sampler, logp, torch.zeros(1, 5))) == {}


def test_an_audit_by_hand():
    # Two sequences of prompt 2 + completion 3. The second is lost: it trains nothing, and is not counted.
    # Fed tokens of the first: all but its last. Lost experts per layer: token 1 one of 2 in layer 1, token 3 two of 2
    # in layer 3; token 2 was not recorded.
    lost = torch.zeros(2, 5, 2, dtype=torch.int16)
    lost[0, 1, 0], lost[0, 3, 1] = 1, 2
    lost[0, 2] = lost[1] = lost[0, 4] = -1
    attention = torch.ones(2, 5, dtype=torch.long)
    old = torch.full((2, 3), -2.0)
    native = old + torch.tensor([[1.5, 0.7, 1.0], [9.0, 9.0, 9.0]]).log()
    replayed = old + torch.tensor([[1.2, 0.7, 1.0], [1.0, 1.0, 1.0]]).log()
    inputs = {
        "completion_mask": torch.ones(2, 3, dtype=torch.long),
        "tool_mask": torch.tensor([[1, 1, 1], [0, 0, 0]]),
        "advantages": torch.tensor([1.0, 1.0]),
        "old_per_token_logps": old,
        "sampling_per_token_logps": old,
    }
    found = audit(native, replayed, lost, SPEC, inputs, attention, CLIP)
    assert found["flip_rate"] == pytest.approx(2 / 6)  # three recorded tokens x two layers
    assert found["slot_flip"] == pytest.approx(3 / 12)
    assert found["token_any_layer"] == pytest.approx(2 / 3)
    assert found["fallback_fraction"] == pytest.approx(1 / 4)
    assert (found["flip_rate/layer_1"], found["flip_rate/layer_3"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found["replay_bias"] == pytest.approx(math.log(1.25) / 3, abs=1e-6)
    # A > 0: only above 1.27 is clipped; 0.7 is not.
    assert (found["clip_native"], found["clip_replay"]) == (pytest.approx(1 / 3), 0.0)
    k3 = {"native": (1.5, 0.7), "replay": (1.2, 0.7)}
    for name, ratios in k3.items():
        by_hand = sum(r - 1 - math.log(r) for r in ratios) / 3
        assert found[f"kl_k3_{name}"] == pytest.approx(by_hand, abs=1e-6)


def test_an_audit_of_nothing_says_nothing():
    inputs = {"completion_mask": torch.zeros(1, 2), "advantages": torch.ones(1)}
    found = audit(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 3, 2), SPEC, inputs, torch.ones(1, 3), CLIP)
    assert all(math.isnan(value) for value in found.values())


# ------------------------------------------------------------------------------------------------------- alarms


def alarms(*steps):
    said = []
    one = ReplayAlarms(said.append)
    for step in steps:
        one.observe(step)
    return said


HEALTHY = {
    "router/flip_rate": 0.1,
    "router/fallback_fraction": 0.0,
    "router/kl_k3_native": 2e-4,
    "router/kl_k3_replay": 5e-5,
    "sampling/kl_k3": 1e-4,
    "sampling/outside_2.0": 0.0,
    "entropy": 1.0,
}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"router/flip_rate": 0.97}], "97% of the replayed choices .* misaligned"),
        ([{"router/fallback_fraction": 0.05}], "5.0% of the tokens have no recorded experts"),
        ([{"router/kl_k3_replay": 3e-4}] * 4, "does not bring the trainer closer"),
        ([{"sampling/kl_k3": 1e-4 * 2**i} for i in range(5)], "keeps rising"),
        ([{"sampling/outside_2.0": 0.002}] * 4, "0.20% of the tokens are twice"),
        ([{}, {"entropy": 0.4}], "entropy fell off a cliff: from 1 to 0.4"),
    ],
)
def test_what_goes_wrong_is_said_once(steps, words):
    said = alarms(*({**HEALTHY, **step} for step in steps * 2))
    assert len(said) == 1 and re.search(words, said[0]), said


def test_a_healthy_run_and_one_bad_value_of_a_trend_are_silent():
    noise = [{**HEALTHY, "sampling/kl_k3": 1e-4 * (1 + 0.3 * (i % 3)), "entropy": 0.97**i} for i in range(30)]
    assert alarms(*noise) == []
    assert alarms(HEALTHY, {**HEALTHY, "sampling/outside_2.0": 0.01, "router/kl_k3_replay": 1e-3}, HEALTHY) == []
    assert alarms({}, {"loss": 1.0}) == []
    r2_first_update = {**HEALTHY, "router/flip_rate": 0.0, "router/kl_k3_replay": 3e-4}
    assert alarms(*[r2_first_update] * 6) == [], "without a flip native and replayed passes are one and the same"


# ------------------------------------------------------------------------------------- the sampler's log-probs


def test_log_probs_of_generate_are_those_of_a_full_pass(tiny_model, tiny_tokenizer):
    """Two prompts of different lengths, early ends, a temperature, a prefill in chunks, no KV cache."""
    torch.manual_seed(0)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    width = 5
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    for options in ({}, {"prefill_chunk_size": 2}, {"use_cache": False}):
        with SampledLogProbs(tiny_model, 0.7, width) as sampled:
            out = tiny_model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
                max_new_tokens=6, eos_token_id=list(range(0, 300, 12)), pad_token_id=0, **options,
            )  # fmt: skip
        completions = []
        for row in out[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token % 12 == 0), len(row) - 1)
            completions.append(row[: end + 1])
        found = sampled.of(completions)
        for prompt, completion, logps in zip(prompts, completions, found, strict=True):
            with torch.no_grad():
                logits = tiny_model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            wanted = torch.log_softmax(logits / 0.7, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
            assert logps == pytest.approx(wanted.tolist(), abs=1e-5)
    assert not tiny_model._forward_hooks and not tiny_model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2, "num_return_sequences": 1}, "fed the tokens that it returned"),
        ({"num_beams": 2, "use_cache": False}, "does not continue|fed the tokens that it returned"),
        ({"prompt_lookup_num_tokens": 2, "do_sample": False}, "assisted"),
        ({"guidance_scale": 1.5}, "does not continue|fed the tokens that it returned|assisted"),
    ],
)
def test_passes_whose_tokens_did_not_come_back_are_an_error(tiny_model, options, words):
    """Beams, drafts and guidance run other tokens through the model than those they return in that row and place."""
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    with pytest.raises(RuntimeError, match=words), SampledLogProbs(tiny_model, 1.0, 8) as sampled:
        settings = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": 299, "pad_token_id": 0} | options
        out = tiny_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        sampled.of(out[:, 8:].tolist())
