"""The BoPO-style loss by hand, in its limits, cut into micro-batches; and a toy in which plain GRPO fails cheaply."""

import math
import random
from dataclasses import replace

import pytest
import torch
from objectives_cases import counts, ragged

from rewards.boundary import Boundary, BoundaryReward
from srpo.objectives import OBJECTIVES, LossConfig, TokenBatch, bopo, srpo
from srpo.objectives.advantages import group_advantages

CFG = LossConfig(epsilon_low=0.2, epsilon_high=0.2)


def batch(logp, advantages, mask, *, old=None, sequences=None, ref=None):
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(mask)
    return TokenBatch(
        logp=logp,
        old_logp=logp.detach() if old is None else torch.tensor(old, dtype=torch.float64),
        mask=mask,
        advantages=torch.tensor(advantages, dtype=torch.float64),
        distilled=torch.zeros(len(mask), dtype=torch.bool),
        divergence=None,
        weights=torch.zeros(mask.shape, dtype=torch.float64),
        counts=counts(float(mask.sum()), 0.0, float(len(mask) if sequences is None else sequences)),
        ref_logp=None if ref is None else torch.tensor(ref, dtype=torch.float64),
    )


def test_every_trajectory_weighs_the_same_whatever_its_length() -> None:
    # One decision with A = 1, four decisions with A = 1; ratio 1 everywhere: L = -(1 + 1) / 2.
    made = batch([[-0.5, 0, 0, 0], [-0.1, -0.2, -0.3, -0.4]], [1.0, 1.0], [[1, 0, 0, 0], [1, 1, 1, 1]])
    out = bopo.loss(made, CFG)
    assert out.loss.item() == pytest.approx(-1.0, abs=1e-12)
    out.loss.backward()
    # d/dlogp of -rho A: -1 per decision; over |y| and over B = 2.
    assert made.logp.grad.tolist() == [[-0.5, 0, 0, 0], [-0.125] * 4]


def test_clipped_on_the_good_side_only_by_hand() -> None:
    # rho = 1.5 with A = 2: min(3, 1.2 * 2) = 2.4. rho = 0.5 with A = 2: min(1, 1.6) = 1. Mean 1.7.
    # rho = 1.5 with A = -1: min(-1.5, -1.2) = -1.5, alone in its row.
    rho = [[math.log(1.5), math.log(0.5)], [math.log(1.5), 9.0]]
    out = bopo.loss(batch(rho, [2.0, -1.0], [[1, 1], [1, 0]], old=[[0.0, 0.0], [0.0, 0.0]]), CFG)
    assert out.loss.item() == pytest.approx((-1.7 + 1.5) / 2, abs=1e-12)


def test_penalty_to_the_start_by_hand() -> None:
    # log pi_ref - log pi = ln 2: k3 = 2 - ln 2 - 1 on one of two decisions; beta .5; one row.
    made = batch([[-1.0, -1.0]], [0.0], [[1, 1]], ref=[[-1.0 + math.log(2), -1.0]])
    out = bopo.loss(made, replace(CFG, beta=0.5))
    assert out.loss.item() == pytest.approx(0.5 * (1 - math.log(2)) / 2, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_splits_add_up_and_masked_tokens_get_no_gradient(seed: int) -> None:
    case = ragged(seed)
    whole = bopo.loss(case.batch(), case.cfg).loss
    [gradient] = torch.autograd.grad(whole, case.logits)
    assert gradient[case.mask == 0].abs().max().item() == 0.0 if (case.mask == 0).any() else True
    parts = []
    for i in range(len(case.mask)):
        row = case.batch()
        one = TokenBatch(
            logp=row.logp[i : i + 1],
            old_logp=row.old_logp[i : i + 1],
            mask=row.mask[i : i + 1],
            advantages=row.advantages[i : i + 1],
            distilled=row.distilled[i : i + 1],
            divergence=None if row.divergence is None else row.divergence[i : i + 1],
            weights=row.weights[i : i + 1],
            counts=row.counts,
            sampler_ratio=None if row.sampler_ratio is None else row.sampler_ratio[i : i + 1],
            ref_logp=row.ref_logp[i : i + 1],
        )
        parts.append(bopo.loss(one, case.cfg).loss)
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)


def test_it_is_srpo_with_the_mean_over_trajectories() -> None:
    case = ragged(3)
    assert bopo.loss(case.batch(), case.cfg).loss.item() == pytest.approx(
        srpo.loss(case.batch(), replace(case.cfg, aggregation="sequence_mean")).loss.item(), abs=0
    )
    assert OBJECTIVES["bopo"].loss is bopo.loss


# ------------------------------------------------------------------------------------------------------- the toy
#
# An episode has 10 steps; on a Hard task both of two steps must be LARGE (each call then works with .9), an Easy one
# is solved by anybody with .95, an Intractable one never. 40 / 35 / 25 % of the tasks. The policy is a table: one
# logit per (cue, step); the cue names the class, and is right in 85 % of the tasks. LARGE costs 5, SMALL 1.

STEPS, CRITICAL, COSTS = 10, (3, 7), (1.0, 5.0)
SHARES = {"easy": 0.40, "hard": 0.35, "intractable": 0.25}
CLASSES = tuple(SHARES)
BOUNDARIES = {
    "easy": Boundary(0.95, 0.95, 10.0, 50.0, False),
    "hard": Boundary(0.0, 0.81, 10.0, 50.0, True),
    "intractable": Boundary(0.0, 0.0, 10.0, 50.0, False),
}


def hard_success(seed: int, reward: BoundaryReward, **how) -> float:
    """Success on Hard tasks after training from P(LARGE) = .1 with the objective and advantages of the library."""
    updates, groups, size = 120, 24, 8
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.full((3, STEPS), math.log(0.1 / 0.9), requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(updates):
        tasks = draw.choices(CLASSES, list(SHARES.values()), k=groups)
        cues = [CLASSES.index(t) if draw.random() < 0.85 else draw.randrange(3) for t in tasks]
        cue = torch.tensor(cues).repeat_interleave(size)
        with torch.no_grad():
            large = (torch.rand(groups * size, STEPS, generator=generator) < logits[cue].sigmoid()).float()
            luck = torch.rand(groups * size, 2, generator=generator)
        rewards, success, references = [], [], []
        for i in range(groups * size):
            task = tasks[i // size]
            good = {
                "easy": bool(luck[i, 0] < 0.95),
                "hard": bool((large[i, list(CRITICAL)] > 0).all() and (luck[i] < 0.9).all()),
                "intractable": False,
            }[task]
            cost = float((large[i] * (COSTS[1] - COSTS[0]) + COSTS[0]).sum())
            rewards.append(reward(float(good), cost, BOUNDARIES[task]))
            references.append(reward.references(BOUNDARIES[task]))
            success.append(good)
        advantages = group_advantages(
            torch.tensor(rewards), size, references=torch.tensor(references), success=torch.tensor(success), **how
        )
        chosen = logits[cue]
        logp = -torch.nn.functional.softplus(torch.where(large > 0, -chosen, chosen))
        made = TokenBatch(
            logp=logp,
            old_logp=logp.detach(),
            mask=torch.ones_like(logp),
            advantages=advantages,
            distilled=torch.zeros(len(logp), dtype=torch.bool),
            divergence=None,
            weights=torch.zeros_like(logp),
            counts=counts(logp.numel(), 0, len(logp), torch.float32),
        )
        optimiser.zero_grad()
        bopo.loss(made, CFG).loss.backward()
        optimiser.step()
    p = logits.detach().sigmoid()
    both = p[:, CRITICAL[0]] * p[:, CRITICAL[1]] * 0.81
    weights = torch.tensor([0.05, 0.90, 0.05])  # the cue on a Hard task: right with .85, else any
    return float((weights * both).sum())


PLAIN, GATED = BoundaryReward(0.3, 0.0), BoundaryReward(0.3, 0.0, gate_cost_on_success=True)
VANILLA = {"baseline": "none", "scale": "group"}


@pytest.mark.parametrize("seed", range(2))
def test_vanilla_grpo_collapses_to_failing_cheaply(seed: int) -> None:
    assert hard_success(seed, PLAIN, **VANILLA) < 0.15


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("reward", "how"),
    [
        (PLAIN, {"baseline": "refmax", "scale": "group+ref"}),
        (GATED, VANILLA),
        (PLAIN, {**VANILLA, "drop_all_fail": True}),
    ],
    ids=["refmax", "gated", "drop_all_fail"],
)
def test_references_gating_and_dropping_do_not(seed: int, reward: BoundaryReward, how: dict) -> None:
    assert hard_success(seed, reward, **how) > 0.5
