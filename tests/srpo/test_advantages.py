"""Every advantage variant against numbers worked by hand, and the toy in which plain GRPO learns to fail cheaply."""

import itertools
import math

import pytest
import torch

from srpo.objectives.advantages import BASELINES, SCALES, group_advantages

# One group of three, R_S = 0.2 and R_L = 0.8.
#   rewards 0, 0.5, 1      mean 0.5      deviations -.5, 0, .5: std = sqrt(.5 / 2) = .5
#   with references {0, .5, 1, .2, .8}: mean .5, squares .25 + 0 + .25 + .09 + .09 = .68, std = sqrt(.68 / 4)
R = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
REFS = torch.tensor([[0.2, 0.8]] * 3, dtype=torch.float64)
GROUP, WITH = 0.5 + 1e-4, math.sqrt(0.17) + 1e-4

# baseline -> b:    refmax = max(.5, .2, .8);  refgroup = mean of the five;  refmean = (.2 + .8) / 2;  refsmall = .2
BY_HAND = {"none": 0.5, "refgroup": 0.5, "refmax": 0.8, "refmean": 0.5, "refsmall": 0.2}


@pytest.mark.parametrize(("baseline", "scale"), list(itertools.product(BASELINES, SCALES)))
def test_every_variant_by_hand(baseline: str, scale: str) -> None:
    b, s = BY_HAND[baseline], {"group": GROUP, "group+ref": WITH, "none": 1.0}[scale]
    got = group_advantages(R, 3, baseline=baseline, scale=scale, references=REFS)
    assert got.tolist() == pytest.approx([(0 - b) / s, (0.5 - b) / s, (1 - b) / s], abs=1e-12)


def test_uneven_references_by_hand() -> None:
    # rewards 1, 3 with references -1, 5 (mean of four: 2) and 0, 1 (mean of four: 5 / 4)
    r = torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float64)
    refs = torch.tensor([[-1.0, 5.0]] * 2 + [[0.0, 1.0]] * 2, dtype=torch.float64)
    values = {
        "refgroup": [-1, 1, -0.25, 1.75],
        "refmax": [-4, -2, -1, 1],  # max(2, 5) = 5, and max(2, 1) = 2
        "refmean": [-1, 1, 0.5, 2.5],
        "refsmall": [2, 4, 1, 3],
    }
    for baseline, expected in values.items():
        assert group_advantages(r, 2, baseline=baseline, scale="none", references=refs).tolist() == expected
    # An Easy task, on which always-small is the better boundary: max(mean 2, 4, -1) = 4.
    easy = torch.tensor([[4.0, -1.0]] * 2, dtype=torch.float64)
    assert group_advantages(r[:2], 2, baseline="refmax", scale="none", references=easy).tolist() == [-3, -1]


def test_none_is_trl_group_normalisation_to_the_last_bit() -> None:
    from trl.trainer.utils import nanstd

    r = torch.randn(12)
    r[5] = torch.nan
    r[8:] = torch.tensor([0.3, 0.3 + 1e-5, 0.3, 0.3])  # nearly agrees: still over its own std + eps
    groups = r.view(-1, 4)
    centred = r - torch.nanmean(groups, dim=1).repeat_interleave(4)
    scaled = torch.nan_to_num(centred / (nanstd(groups, dim=1).repeat_interleave(4) + 1e-4), nan=0.0)
    assert torch.equal(group_advantages(r, 4, baseline="none", scale="group"), scaled)
    assert torch.equal(group_advantages(r, 4, baseline="none", scale="none"), torch.nan_to_num(centred, nan=0.0))


def test_an_unscored_rollout_is_not_in_its_group() -> None:
    r = torch.tensor([0.0, torch.nan, 1.0], dtype=torch.float64)
    for baseline in BASELINES:
        got = group_advantages(r, 3, baseline=baseline, scale="group+ref", references=REFS)
        two = group_advantages(r[[0, 2]], 2, baseline=baseline, scale="group+ref", references=REFS[:2])
        assert got.tolist() == pytest.approx([two[0].item(), 0.0, two[1].item()], abs=1e-12)
    everything = group_advantages(r * torch.nan, 3, baseline="refmax", scale="group", references=REFS)
    assert everything.tolist() == [0.0, 0.0, 0.0]


def test_hard_and_everything_fails_cheaply() -> None:
    # Hard: R_L = .9 * 2 - .3 = 1.5, R_S = 0; rollouts fail at normalised costs 0, .1, .2 with lambda .3.
    r = torch.tensor([0.0, -0.03, -0.06])
    refs = torch.tensor([[0.0, 1.5]] * 3)
    anchored = group_advantages(r, 3, baseline="refmax", scale="group+ref", references=refs)
    vanilla = group_advantages(r, 3, baseline="none", scale="group")
    assert (anchored < 0).all()
    assert vanilla[0] > 0.9  # the cheapest failure is praised as if it had solved the task
    spread = anchored.max() - anchored.min()
    assert spread < 0.1 < vanilla.max() - vanilla.min()


def test_easy_cheaper_success_wins_and_large_success_is_below_the_cheap_boundary() -> None:
    # Easy: R_S = 1, R_L = 1 - .3 = .7. Successes at normalised cost 0, .5 and 1.
    r = torch.tensor([1.0, 0.85, 0.7])
    refs = torch.tensor([[1.0, 0.7]] * 3)
    for baseline in BASELINES:
        a = group_advantages(r, 3, baseline=baseline, scale="group+ref", references=refs)
        assert a[0] > a[1] > a[2] and a[2] < 0


def test_intractable_cheapest_failure_is_best() -> None:
    r = torch.tensor([0.0, -0.3, -0.6])  # -lambda C_norm
    refs = torch.tensor([[0.0, -0.3]] * 3)
    for baseline, scale in itertools.product(BASELINES, SCALES):
        a = group_advantages(r, 3, baseline=baseline, scale=scale, references=refs)
        assert a.argmax() == 0 and torch.isfinite(a).all()


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_that_agrees(scale: str) -> None:
    r = torch.full((4,), 0.3)
    alone = group_advantages(r, 4, baseline="none", scale=scale, references=torch.tensor([[0.0, 1.0]] * 4))
    assert alone.tolist() == [0.0] * 4
    above = group_advantages(r, 4, baseline="refsmall", scale=scale, references=torch.tensor([[0.1, 0.1]] * 4))
    below = group_advantages(r, 4, baseline="refmax", scale=scale, references=torch.tensor([[0.1, 0.9]] * 4))
    assert (above > 0).all() and (below < 0).all()
    assert torch.isfinite(above).all() and above.abs().max() < 10 and below.abs().max() < 10


def test_dropping_groups_without_success() -> None:
    r = torch.tensor([0.0, -0.3, 1.0, -0.3])
    success = torch.tensor([False, False, True, False])
    a = group_advantages(r, 2, baseline="none", scale="group", success=success, drop_all_fail=True)
    kept = group_advantages(r, 2, baseline="none", scale="group")
    assert a[:2].tolist() == [0.0, 0.0] and torch.equal(a[2:], kept[2:])
    r, success = torch.arange(6.0), torch.tensor([False, False, False, True, False, False])
    a = group_advantages(r, 2, baseline="none", scale="none", success=success, drop_all_fail=True)
    assert a.tolist() == [0.0, 0.0, -0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "mean", "scale": "group"}, "refmax"),
        ({"baseline": "none", "scale": "batch"}, "group"),
        ({"baseline": "refmax", "scale": "group"}, "needs the references"),
        ({"baseline": "none", "scale": "group+ref"}, "needs the references"),
        ({"baseline": "none", "scale": "group", "drop_all_fail": True}, "succeeded"),
        ({"baseline": "refmax", "scale": "none", "references": torch.eye(2)}, "same for all"),
        ({"baseline": "refmax", "scale": "none", "references": torch.full((2, 2), torch.nan)}, "finite"),
    ],
)
def test_what_cannot_be_computed_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor([0.0, 1.0]), 2, **options)
