"""Audits and mismatch by hand; alarms that speak on what they are for, and not otherwise."""

import math
import re

import pytest
import torch

from srpo.replay.expert_table import RouterSpec
from srpo.replay.metrics import ReplayAlarms, audit
from srpo.rollout.sampler_logprobs import mismatch_metrics, mismatch_sums

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
