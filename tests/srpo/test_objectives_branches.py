"""Token weights (eq. 4.2) and the four routing cases (eq. 4.1)."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from srpo.objectives import OBJECTIVES, entropy_weights, objective_of
from srpo.objectives.branches import distilled_by
from srpo.objectives.names import LOSS_TYPES, OBJECTIVE_NAMES

torch.set_num_threads(1)


def entropies(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# H = (0, ln 2, ln 4)
ENTROPY = entropies([0.0, math.log(2), math.log(4)])
ALL = torch.ones(1, 3, dtype=torch.long)


def test_weights_by_hand() -> None:
    # beta = 1: w~ = (1, 1/2, 1/4), Z = (7/4)/3 = 7/12, w = (12/7, 6/7, 3/7)
    assert torch.allclose(entropy_weights(ENTROPY, ALL, 1.0), entropies([12 / 7, 6 / 7, 3 / 7]), atol=1e-14)
    # beta = 2: w~ = (1, 1/4, 1/16), Z = (21/16)/3 = 7/16, w = (16/7, 4/7, 1/7)
    assert torch.allclose(entropy_weights(ENTROPY, ALL, 2.0), entropies([16 / 7, 4 / 7, 1 / 7]), atol=1e-14)


def test_tokens_outside_omega_neither_get_a_weight_nor_move_the_others() -> None:
    # Omega = tokens 0 and 2: w~ = (1, 1/4), Z = 5/8, w = (8/5, 2/5)
    omega = torch.tensor([[1, 0, 1], [0, 0, 0]])
    entropy = torch.cat([ENTROPY, entropies([math.nan, math.inf, -5.0])])
    entropy[0, 1] = math.nan
    want = entropies([8 / 5, 0, 2 / 5], [0, 0, 0])
    assert torch.allclose(entropy_weights(entropy, omega, 1.0), want, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_beta_zero_is_exactly_one_on_omega(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    omega = torch.rand(40, 50, generator=g) < 0.4
    entropy = (10 * torch.rand(40, 50, generator=g)).to(dtype)
    assert torch.equal(entropy_weights(entropy, omega, 0.0), omega.to(torch.promote_types(dtype, torch.float32)))


def test_empty_omega_gives_zeros_and_still_joins_the_reduction() -> None:
    calls: list[Tensor] = []

    def reduce(stats: Tensor) -> Tensor:
        calls.append(stats)
        return stats

    weights = entropy_weights(torch.full((2, 3), math.nan), torch.zeros(2, 3), 1.0, reduce)
    assert torch.equal(weights, torch.zeros(2, 3))
    assert len(calls) == 1  # a rank without distilled tokens must not leave the others waiting
    assert torch.equal(calls[0], torch.tensor([[math.inf, 0.0, 0.0]]))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0, 1000.0])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_mean_over_omega_is_one_whatever_the_split(beta: float, ranks: int) -> None:
    """Each rank sees its rows and everybody's statistics; the weights are those of one process."""
    g = torch.Generator().manual_seed(1)
    entropy = 8 + 4 * torch.rand(16, 20, generator=g, dtype=torch.float64)
    omega = torch.rand(16, 20, generator=g) < 0.3
    omega[:4] = False  # the first of four ranks has nothing to distil
    whole = entropy_weights(entropy, omega, beta)
    assert whole[omega].mean().item() == pytest.approx(1.0, abs=1e-12)

    shards = list(zip(entropy.chunk(ranks), omega.chunk(ranks), strict=True))
    totals: list[Tensor] = []
    for e, o in shards:
        entropy_weights(e, o, beta, lambda stats: totals.append(stats) or stats)
    gathered = torch.cat(totals)
    parts = torch.cat([entropy_weights(e, o, beta, lambda _: gathered) for e, o in shards])
    assert torch.allclose(parts, whole, atol=1e-13)
    if beta:
        assert whole[omega].std() > 0.1


def test_extreme_entropies_are_finite() -> None:
    # exp(-1 * 60) = 8.8e-27: equal entropies mean weight 1, however large they are
    weights = entropy_weights(entropies([60.0, 60.0]), torch.ones(1, 2), 1.0)
    assert weights.tolist()[0] == [1.0, 1.0]
    one_sure = entropy_weights(entropies([60.0, 0.0]).float(), torch.ones(1, 2), 1.0)
    assert one_sure.tolist()[0] == pytest.approx([0.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [1.6, 2.0, 10.0, 1e4])
def test_entropies_near_the_largest_of_a_vocabulary_keep_mean_one(beta: float, dtype: torch.dtype) -> None:
    """V = 151,936: ln V = 11.93. In the linear scale Z was clamped: means of 0.51 at beta 1.6, 0.004, 0.000."""
    entropy = (11.93 - 0.01 * torch.rand(8, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    weights = entropy_weights(entropy, torch.ones(8, 50), beta)
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-5)
    top, other = entropy.flatten().topk(2, largest=False).values  # w~ of two tokens differ by e^(-beta (H - H'))
    high, low = weights.flatten().topk(2).values
    assert (low / high).item() == pytest.approx(math.exp(-beta * float(other - top)), rel=1e-2)


def test_weights_are_constants() -> None:
    entropy = ENTROPY.clone().requires_grad_()
    assert not entropy_weights(entropy, ALL, 1.0).requires_grad


def by(name: str, correct: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    branch = OBJECTIVES[name].branch
    assert branch is not None
    return distilled_by(branch, correct, available)


def test_the_four_cases_of_table_7() -> None:
    correct = torch.tensor([True, True, False, False])
    available = torch.tensor([True, False, True, False])
    assert by("srpo", correct, available).tolist() == [False, False, True, False]
    assert by("sdpo", correct, available).tolist() == [True, False, True, False]
    assert OBJECTIVES["grpo"].branch is None


@pytest.mark.parametrize(
    ("correct", "distilled"),
    [
        ([1, 0, 0, 0], [0, 1, 1, 1]),  # the sole correct rollout has no sibling to learn from and keeps its reward
        ([1, 1, 0, 0], [0, 0, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),  # all wrong: nobody to learn from
        ([1, 1, 1, 1], [0, 0, 0, 0]),  # all right: nobody has to learn
    ],
)
def test_groups_with_sibling_demonstrations(correct: list[int], distilled: list[int]) -> None:
    c = torch.tensor(correct, dtype=torch.bool)
    other_is_correct = torch.stack([(c.sum() - c[i].long()) > 0 for i in range(len(c))])
    assert by("srpo", c, other_is_correct).tolist() == [bool(z) for z in distilled]


def test_feedback_routes_an_all_wrong_group() -> None:
    wrong, feedback = torch.zeros(3, dtype=torch.bool), torch.tensor([True, False, True])
    assert by("srpo", wrong, feedback).tolist() == [True, False, True]


def test_inputs_are_not_changed_and_not_shared() -> None:
    correct, available = torch.tensor([False, True]), torch.tensor([True, True])
    for name in ("sdpo", "srpo", "bopo"):
        by(name, correct, available).fill_(False)
    assert (correct.tolist(), available.tolist()) == ([False, True], [True, True])


def test_wrong_types_are_refused() -> None:
    yes = torch.tensor([True])
    with pytest.raises(TypeError, match="bool"):
        by("srpo", torch.tensor([0.7]), yes)  # a graded reward must be turned into a predicate first


def test_a_record_per_name_and_a_paper_per_record() -> None:
    assert list(OBJECTIVES) == [*OBJECTIVE_NAMES, *LOSS_TYPES]
    for name, paper in (OBJECTIVE_NAMES | LOSS_TYPES).items():
        assert OBJECTIVES[name].paper == paper
        assert (OBJECTIVES[name].loss is None) == (name == "grpo")


def test_a_loss_type_of_ours_is_found_where_the_objective_leaves_the_loss_open() -> None:
    names = {
        (objective, loss_type): objective_of(SimpleNamespace(objective=objective, loss_type=loss_type))
        for objective in OBJECTIVE_NAMES
        for loss_type in ("dapo", "grpo", "minirl")
    }
    for (objective, loss_type), record in names.items():
        wanted = loss_type if (objective, loss_type) == ("grpo", "minirl") else objective
        assert record is OBJECTIVES[wanted]


def test_the_names_are_read_without_torch() -> None:
    code = "import sys, srpo.objectives.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
