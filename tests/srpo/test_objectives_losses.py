"""SDPO, SRPO and the GRPO branch: numbers by hand, identities, splits, hostile inputs."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from objectives_cases import Case, counts, ragged
from torch import Tensor

from srpo.objectives import OBJECTIVES, LossConfig, TokenBatch, entropy_weights, grpo, sdpo, srpo
from srpo.objectives.batch import per_step, sequence_mean, token_mean

D = torch.float64
LOSSES = {name: record.loss for name, record in OBJECTIVES.items() if record.loss is not None}  # not TRL's own
DISTILLING = [name for name in LOSSES if OBJECTIVES[name].branch is not None]
ONE_ROW = torch.ones(1, 3, dtype=torch.long)


def t(*values: object) -> Tensor:
    return torch.tensor(values, dtype=D)


def batch(**changes: object) -> TokenBatch:
    """Two rows of two tokens; row 0 is rewarded with A = 1, row 1 is distilled. All ratios are 1."""
    logp = t([-1.0, -2.0], [-1.5, -0.5]).requires_grad_()
    fields: dict[str, object] = {
        "logp": logp,
        "old_logp": logp.detach().clone(),
        "mask": torch.tensor([[1, 1], [1, 1]]),
        "advantages": t(1.0, -1.0),
        "distilled": torch.tensor([False, True]),
        "divergence": t([0.0, 0.0], [0.3, 0.5]).requires_grad_(),
        "weights": t([0.0, 0.0], [1.5, 0.5]),
        "counts": counts(4, 2, 2),
    }
    return TokenBatch(**(fields | changes))  # type: ignore[arg-type]


# --- denominators ----------------------------------------------------------------------------------------------------


def test_means_by_hand() -> None:
    x = t([1.0, 2.0, 4.0], [8.0, 16.0, 32.0])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert token_mean(x, mask, t(10.0)[0]).item() == 3.5  # (1 + 2 + 32) / 10
    assert sequence_mean(x, mask, t(5.0)[0]).item() == 6.7  # ((1 + 2)/2 + 32/1) / 5 = 33.5 / 5
    assert token_mean(x, mask * 0, t(0.0)[0]).item() == 0.0
    assert sequence_mean(x, mask * 0, t(0.0)[0]).item() == 0.0


def test_denominator_of_a_step_by_hand() -> None:
    # 1,200 tokens in the generation batch, 2 ranks, 4 of 8 micro-batches per step: 1200 / 2 * 4 / 8 = 300
    total = torch.tensor(1200)
    assert per_step(total, ranks=2, accumulation=4, steps_per_generation=8).item() == 300.0
    assert per_step(torch.tensor(0), ranks=4).item() == 0.25  # never a division by zero


def test_less_than_one_token_per_rank_is_not_rounded_up() -> None:
    """One token on one of two ranks: count 1/2, loss 2 there and 0 here, mean over ranks 1."""
    count = per_step(torch.tensor(1), ranks=2)
    here = token_mean(t([1.0]), torch.tensor([[1]]), count)
    there = token_mean(t([1.0]), torch.tensor([[0]]), count)
    assert ((here + there) / 2).item() == 1.0


# --- the GRPO branch, by hand ----------------------------------------------------------------------------------------

# eps_low 0.2, eps_high 0.28: the band of rho is [0.8, 1.28]
#   rho  A   rho A  clip A   -min     d/dlogp = -A rho where rho A is the minimum, else 0
SURROGATE = [
    (1.2, 1.0, None, -1.2, -1.2),  # inside the band
    (1.5, 1.0, None, -1.28, 0.0),  # too high already: min(1.5, 1.28)
    (1.5, -1.0, None, 1.5, 1.5),  # min(-1.5, -1.28) = -1.5: a bad token that got likelier is pushed down
    (0.5, -1.0, None, 0.8, 0.0),  # min(-0.5, -0.8) = -0.8: low enough
    (0.5, 1.0, None, -0.5, -0.5),  # min(0.5, 0.8)
    (4.0, -1.0, 3.0, 3.0, 0.0),  # delta caps rho: min(-3, -1.28) = -3, no slope beyond the cap
    (2.0, 0.5, 3.0, -0.64, 0.0),  # min(1, 0.64)
]


@pytest.mark.parametrize(("rho", "advantage", "delta", "value", "slope"), SURROGATE)
def test_surrogate_by_hand(rho: float, advantage: float, delta: float | None, value: float, slope: float) -> None:
    logp = t([math.log(rho)]).requires_grad_()
    loss = grpo.token_loss(
        logp, t([0.0]), t(advantage), ONE_ROW[:, :1], epsilon_low=0.2, epsilon_high=0.28, delta=delta
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert logp.grad.item() == pytest.approx(slope, abs=1e-12)


def test_sequence_level_ratio_is_the_geometric_mean_of_the_trained_tokens() -> None:
    # ratios (2, 8, 100), the last one masked: sqrt(16) = 4, clipped to 1.28 for A = 1: one value for the row
    logp = t([math.log(2), math.log(8), math.log(100)])
    mask = torch.tensor([[1, 1, 0]])
    assert grpo.ratio(logp, torch.zeros_like(logp), mask, "sequence").item() == pytest.approx(4.0)
    loss = grpo.token_loss(
        logp, torch.zeros_like(logp), t(1.0), mask, epsilon_low=0.2, epsilon_high=0.28, level="sequence"
    )
    assert loss.tolist() == [pytest.approx([-1.28])]


def test_kl_penalty_by_hand() -> None:
    # ref/pi = 2: 2 - ln 2 - 1 = 0.3068528194; equal: 0
    penalty = grpo.kl_penalty(t([0.0, -1.0]), t([math.log(2), -1.0]))
    assert penalty.tolist() == [pytest.approx([0.3068528194, 0.0], abs=1e-10)]


# --- SDPO by hand ----------------------------------------------------------------------------------------------------


def test_importance_clip_by_hand() -> None:
    # ratios (1/2, 3, e^30 -> clamped to e^20 -> 2) times D = (0.3, 0.5, 0.1) with cap 2: 0.15, 1.0, 0.2
    logp, d = t([math.log(0.5), math.log(3), 30.0]).requires_grad_(), t([0.3, 0.5, 0.1]).requires_grad_()
    loss = sdpo.token_loss(d, logp, torch.zeros_like(logp), is_clip=2.0)
    assert loss.tolist() == [pytest.approx([0.15, 1.0, 0.2])]
    loss.sum().backward()
    assert logp.grad is None  # the ratio is a constant
    assert d.grad.tolist() == [pytest.approx([0.5, 2.0, 2.0])]
    assert sdpo.token_loss(d, logp, torch.zeros_like(logp), is_clip=None) is d


def test_the_log_ratio_is_clamped_at_20_on_both_sides() -> None:
    # e^3 = 20.0855 and e^-3 = 0.0498 pass, e^30 and e^-30 become e^20 = 4.85e8 and e^-20 = 2.06e-9
    ratios = sdpo.importance(t([3.0, -3.0, 30.0, -30.0]), torch.zeros(1, 4, dtype=D))
    assert ratios.tolist() == [pytest.approx([20.0855369, 0.0497870684, 4.85165195e8, 2.06115362e-9], rel=1e-8)]


def test_what_stands_in_rows_that_are_not_distilled_is_not_read() -> None:
    garbage = {"divergence": t([9.0, math.nan], [0.3, 0.5]), "weights": t([7.0, 7.0], [1.5, 0.5])}
    assert sdpo.loss(batch(**garbage), LossConfig()).loss.item() == pytest.approx(0.35)
    assert srpo.loss(batch(**garbage), LossConfig()).loss.item() == pytest.approx(-0.325)


def test_sdpo_token_mean_by_hand() -> None:
    # row 1 alone: (1.5 * 0.3 + 0.5 * 0.5) / 2 = (0.45 + 0.25) / 2
    assert sdpo.loss(batch(), LossConfig()).loss.item() == pytest.approx(0.35)
    # ratios (2, 4 -> 2), sampler (0.5, 1): (1.5 * 0.3 * 2 * 0.5 + 0.5 * 0.5 * 2 * 1) / 2 = (0.45 + 0.5) / 2
    b = batch(sampler_ratio=t([9.0, 9.0], [0.5, 1.0]))
    b = replace(b, old_logp=b.logp.detach() - t([0.0, 0.0], [math.log(2), math.log(4)]))
    out = sdpo.loss(b, LossConfig())
    assert out.loss.item() == pytest.approx(0.475)
    assert out.metrics["is_ratio"].item() == pytest.approx(3.0)  # (2 + 4) / 2
    assert out.metrics["is_clipped"].item() == pytest.approx(0.5)  # 4 is above the cap, 2 is at it


def test_sdpo_masked_tokens_do_not_count() -> None:
    # only the second token of row 1 is trained: 0.5 * 0.5 / 1
    b = batch(mask=torch.tensor([[1, 1], [0, 1]]), counts=counts(3, 1, 2))
    assert sdpo.loss(b, LossConfig()).loss.item() == pytest.approx(0.25)


def test_sdpo_sequence_mean_by_hand() -> None:
    # 1/B sum_i: row 0 has no teacher and contributes 0 but counts; row 1: (0.45 + 0.25) / 2 = 0.35; B = 2
    assert sdpo.loss(batch(), LossConfig(aggregation="sequence_mean")).loss.item() == pytest.approx(0.175)


def test_sdpo_gradient_by_hand() -> None:
    # dL/dD = w / |Omega|: (0.75, 0.25) in row 1, nothing elsewhere
    b = batch()
    sdpo.loss(b, LossConfig()).loss.backward()
    assert b.divergence.grad.tolist() == [[0.0, 0.0], [0.75, 0.25]]
    assert torch.equal(b.logp.grad, torch.zeros(2, 2, dtype=D))


# --- SRPO by hand ----------------------------------------------------------------------------------------------------


def test_srpo_by_hand() -> None:
    # row 0: -1 * 1 for two tokens; row 1: 0.45 + 0.25; joint denominator 4: (-2 + 0.7) / 4
    b = batch()
    out = srpo.loss(b, LossConfig())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.325)
    assert out.metrics["loss/grpo"].item() == pytest.approx(-0.5)
    assert out.metrics["loss/sdpo"].item() == pytest.approx(0.175)
    assert b.logp.grad.tolist() == [[-0.25, -0.25], [0.0, 0.0]]  # -A rho / 4; the distilled row's reward is not used
    assert b.divergence.grad.tolist() == [[0.0, 0.0], [0.375, 0.125]]  # w / 4


def test_srpo_sampler_ratio_acts_on_both_branches() -> None:
    # row 0 * (0.5, 1): -1.5; row 1 * (2, 1): 0.9 + 0.25 = 1.15; (-1.5 + 1.15) / 4
    out = srpo.loss(batch(sampler_ratio=t([0.5, 1.0], [2.0, 1.0])), LossConfig())
    assert out.loss.item() == pytest.approx(-0.0875)
    # one ratio per row: (0.5 * -2 + 2 * 0.7) / 4 = 0.1
    assert srpo.loss(batch(sampler_ratio=t([0.5], [2.0])), LossConfig()).loss.item() == pytest.approx(0.1)


def test_srpo_sequence_mean_by_hand() -> None:
    # row 0 has one trained token: -1; row 1: 0.7 / 2 = 0.35; (-1 + 0.35) / 2
    b = batch(mask=torch.tensor([[1, 0], [1, 1]]), counts=counts(3, 2, 2))
    assert srpo.loss(b, LossConfig(aggregation="sequence_mean")).loss.item() == pytest.approx(-0.325)


def test_srpo_kl_penalty_by_hand() -> None:
    # ref/pi = 2 for the first token of both rows: k3 = 0.3068528194 twice; 0.1 * 0.6137056389 / 4 = 0.0153426410
    b = batch()
    b = replace(b, ref_logp=b.logp.detach() + t([math.log(2), 0.0], [math.log(2), 0.0]))
    out = srpo.loss(b, LossConfig(beta=0.1))
    assert out.loss.item() == pytest.approx(-0.325 + 0.0153426410, abs=1e-10)
    assert out.metrics["loss/kl"].item() == pytest.approx(0.0153426410, abs=1e-10)


def test_srpo_clip_metrics_are_shares_of_all_trained_tokens() -> None:
    # row 0 (A = 1): rho = (1.5, 0.5): one clipped high. Row 1 (A = -1) is distilled: rho = 0.5 is no GRPO clip there,
    # its 3 is above the cap of 2
    b = batch()
    b = replace(b, old_logp=b.logp.detach() - t([1.5, 0.5], [0.5, 3.0]).log())
    metrics = srpo.loss(b, LossConfig()).metrics
    got = {name: round(metrics[name].item(), 12) for name in ("clip_ratio/low", "clip_ratio/high", "is_clipped")}
    assert got == {"clip_ratio/low": 0.0, "clip_ratio/high": 0.25, "is_clipped": 0.25}
    assert metrics["is_ratio"].item() == pytest.approx((1.5 + 0.5 + 0.5 + 3.0) / 4)
    low = srpo.loss(replace(b, distilled=torch.tensor([False, False])), LossConfig()).metrics["clip_ratio/low"]
    assert low.item() == pytest.approx(0.25)


# --- identities ------------------------------------------------------------------------------------------------------

SEEDS = range(60)


def run(case: Case, objective: str = "srpo") -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(LOSSES[objective](case.batch(), case.cfg).loss, case.logits)
    return LOSSES[objective](case.batch(), case.cfg).loss.detach(), grad


def test_everything_distilled_with_unit_weights_is_sdpo() -> None:
    """The other special case: z = 1, w = 1, no KL: SRPO's joint denominator is SDPO's."""
    for seed in SEEDS:
        case = ragged(seed)
        case.distilled, case.cfg = torch.ones_like(case.distilled), replace(case.cfg, beta=0.0)
        case.weights = case.mask.to(D)
        case.counts = replace(case.counts, distilled_tokens=case.counts.tokens)
        for a, b in zip(run(case), run(case, "sdpo"), strict=True):
            assert torch.equal(a, b)


def test_beta_zero_of_the_weights_changes_nothing() -> None:
    for seed in SEEDS:
        case = ragged(seed)
        omega = case.mask * case.distilled.unsqueeze(1)
        case.weights = omega.to(D)
        plain = run(case)
        case.weights = entropy_weights(torch.rand(case.mask.shape, dtype=D), omega, 0.0)
        assert all(torch.equal(a, b) for a, b in zip(plain, run(case), strict=True))


def test_first_inner_step_has_zero_loss_and_a_gradient() -> None:
    """KL off, pi_old = pi, centred advantages, sequence mean: the value is -mean A = 0, the gradient is not."""
    case = ragged(3)
    size, length, _ = case.logits.shape
    case.mask = torch.ones(size, length, dtype=torch.long)
    case.distilled = torch.zeros(size, dtype=torch.bool)
    case.old_logp, case.sampler_ratio = case.logp().detach(), None
    case.advantages = case.advantages - case.advantages.mean()
    case.counts = counts(size * length, 0, size)
    case.cfg = LossConfig(aggregation="sequence_mean")
    loss, grad = run(case)
    assert size > 1
    assert abs(loss.item()) <= 1e-15
    assert grad.abs().max() > 1e-3


def test_equal_rewards_give_exactly_no_gradient() -> None:
    """All advantages 0 and nobody to learn from (an all-wrong group with binary rewards): Table 7's last row."""
    for seed in SEEDS:
        case = ragged(seed)
        case.advantages, case.cfg = torch.zeros_like(case.advantages), replace(case.cfg, beta=0.0)
        case.distilled = torch.zeros_like(case.distilled)
        _, grad = run(case)
        assert torch.equal(grad, torch.zeros_like(grad))


def test_a_group_that_matches_its_teacher_has_no_gradient() -> None:
    """No demonstration and no EMA drift yet: teacher = student, so the distilled rows are silent."""
    for seed in SEEDS:
        case = ragged(seed, "sdpo")
        case.teacher_logits, case.distilled = case.logits.detach().clone(), torch.ones_like(case.distilled)
        case.weights = case.mask.to(D)
        loss, grad = run(case, "sdpo")
        assert abs(loss.item()) <= 1e-13
        assert grad.abs().max() <= 1e-13


@pytest.mark.parametrize("objective", LOSSES)
def test_the_order_of_the_completions_does_not_matter(objective: str) -> None:
    for seed in SEEDS:
        case = ragged(seed, objective)
        loss, grad = run(case, objective)
        order = torch.randperm(len(case.distilled), generator=torch.Generator().manual_seed(seed))
        shuffled, shuffled_grad = run(rows(case, order), objective)
        assert torch.allclose(loss, shuffled, atol=1e-14)
        assert torch.allclose(grad[order], shuffled_grad, atol=1e-14)


@pytest.mark.parametrize("objective", LOSSES)
def test_masked_tokens_have_exactly_no_gradient(objective: str) -> None:
    """Padding and text of others, whatever stands there."""
    for seed in SEEDS:
        case = ragged(seed, objective)
        loss, grad = run(case, objective)
        assert torch.equal(grad[case.mask == 0], torch.zeros_like(grad[case.mask == 0]))
        noise = (case.mask == 0).unsqueeze(-1) * torch.randn(case.logits.shape, dtype=D)
        case.logits = (case.logits.detach() + noise).requires_grad_()
        assert torch.equal(run(case, objective)[0], loss)


@pytest.mark.parametrize("objective", DISTILLING)
def test_gradcheck_of_the_divergence_path(objective: str) -> None:
    b = batch()
    fixed = b.logp.detach()

    def value(divergence: Tensor, logp: Tensor) -> Tensor:
        # is_clip None: with it the ratio is a constant by definition, which finite differences cannot see
        return LOSSES[objective](
            replace(b, divergence=divergence, logp=logp, old_logp=fixed - 0.1), LossConfig(is_clip=None)
        ).loss

    assert torch.autograd.gradcheck(value, (t([0.0, 0.0], [0.3, 0.5]).requires_grad_(), fixed.requires_grad_()))


# --- splits ----------------------------------------------------------------------------------------------------------


def rows(case: Case, index: Tensor | slice) -> Case:
    """The case restricted to some rows, with the counts of the whole step."""
    cut = {
        name: getattr(case, name)[index]
        for name in ("teacher_logits", "ids", "mask", "old_logp", "ref_logp", "advantages", "distilled", "weights")
    }
    tis = None if case.sampler_ratio is None else case.sampler_ratio[index]
    return replace(case, logits=case.logits.detach()[index].requires_grad_(), sampler_ratio=tis, **cut)


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_split_into_micro_batches_and_ranks_does_not_matter(objective: str, ranks: int) -> None:
    """Sum over micro-batches, mean over ranks: loss, gradient and every metric are those of one big batch."""
    compared = 0
    for seed in range(200):
        case = ragged(seed, objective)
        size = len(case.distilled)
        if size < 2 or not case.mask.any():
            continue
        omega = case.mask * case.distilled.unsqueeze(1)
        case.counts = counts(float(case.mask.sum()), float(omega.sum()), size)
        whole = LOSSES[objective](case.batch(), case.cfg)
        (grad,) = torch.autograd.grad(whole.loss, case.logits)

        case.counts = counts(float(case.mask.sum()) / ranks, float(omega.sum()) / ranks, size / ranks)
        parts = [rows(case, slice(i, i + 1)) for i in range(size)]  # micro-batches of one, some without any token
        outputs = [LOSSES[objective](part.batch(), part.cfg) for part in parts]
        for out in outputs:
            out.loss.backward()  # works for every part, also where nothing is trained
        assert torch.allclose(sum(out.loss for out in outputs) / ranks, whole.loss, atol=1e-13)
        split_grad = torch.cat([part.logits.grad for part in parts]) / ranks
        assert torch.allclose(split_grad, grad, atol=1e-13)
        for name, value in whole.metrics.items():
            assert torch.allclose(sum(out.metrics[name] for out in outputs) / ranks, value, atol=1e-12), name
        for name, value in whole.tokens.items():
            assert sum(out.tokens[name] for out in outputs) == value, name
        compared += 1
    assert compared >= 100


# --- hostile inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", LOSSES)
@pytest.mark.parametrize("aggregation", ["token", "sequence_mean"])
def test_a_batch_without_a_trained_token_is_a_connected_zero(objective: str, aggregation: str) -> None:
    cfg = LossConfig(aggregation=aggregation)
    for b in (
        batch(mask=torch.zeros(2, 2), counts=counts(0, 0, 2)),
        batch(mask=torch.zeros(2, 2), counts=counts(0, 0, 0), distilled=torch.tensor([True, True])),
        batch(mask=torch.zeros(2, 2), counts=counts(0, 0, 2), divergence=None, distilled=torch.tensor([False, False])),
        batch(mask=torch.zeros(2, 2), counts=counts(9, 9, 2), divergence=None),  # truncated and masked out
    ):
        out = LOSSES[objective](b, cfg)
        out.loss.backward()
        assert out.loss.item() == 0.0
        assert torch.equal(b.logp.grad, torch.zeros(2, 2, dtype=D))
        assert all(torch.isfinite(x) for x in out.metrics.values())


def test_sdpo_without_a_distilled_row_is_a_connected_zero() -> None:
    b = batch(divergence=None, distilled=torch.tensor([False, False]), counts=counts(4, 0, 2))
    out = sdpo.loss(b, LossConfig())
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert torch.equal(b.logp.grad, torch.zeros(2, 2, dtype=D))


def test_an_exploding_ratio_in_a_distilled_row_stays_out_of_the_reward_branch() -> None:
    """log pi - log pi_old = 800 overflows exp; distilled rows clamp it, and nothing turns into 0 * inf."""
    b = batch()
    b = replace(b, old_logp=b.logp.detach() - t([0.0, 0.0], [800.0, 0.0]))
    out = srpo.loss(b, LossConfig())
    out.loss.backward()
    assert torch.isfinite(b.logp.grad).all()
    # row 1: 1.5 * 0.3 * 2 + 0.5 * 0.5 = 1.15; (-2 + 1.15) / 4
    assert out.loss.item() == pytest.approx(-0.2125)


def test_a_negative_infinite_log_ratio_is_finite() -> None:
    b = batch()
    b = replace(b, old_logp=b.logp.detach() + 800.0)
    for name in LOSSES:
        out = LOSSES[name](b, LossConfig())
        (grad,) = torch.autograd.grad(out.loss, b.logp)
        assert torch.isfinite(out.loss)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("objective", LOSSES)
def test_bfloat16_log_probs(objective: str) -> None:
    exact, rough = batch(), batch()
    for name in ("logp", "old_logp"):
        rough = replace(rough, **{name: getattr(rough, name).detach().bfloat16()})
    rough = replace(rough, logp=rough.logp.requires_grad_())
    out = LOSSES[objective](rough, LossConfig())
    out.loss.backward()
    assert torch.isfinite(rough.logp.grad).all()
    assert out.loss.item() == pytest.approx(LOSSES[objective](exact, LossConfig()).loss.item(), abs=1e-2)


# --- mistakes are refused --------------------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no divergence"):
        batch(divergence=None)
    with pytest.raises(ValueError, match="sdpo has no reference-policy penalty"):
        sdpo.loss(batch(), LossConfig(beta=0.1))
    with pytest.raises(ValueError, match="needs ref_logp"):
        srpo.loss(batch(), LossConfig(beta=0.1))
    with pytest.raises(ValueError, match="level"):
        LossConfig(level="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aggregation"):
        LossConfig(aggregation="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is_clip"):
        LossConfig(is_clip=0.0)


def test_importing_the_objectives_does_not_import_trl() -> None:
    code = "import sys, srpo.objectives; sys.exit('trl' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
