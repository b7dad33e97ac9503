"""Parity with the installed TRL: its own functions and its own `_compute_loss`, called on the same tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objectives_cases import Case, counts, ragged
from torch import Tensor
from trl import GRPOTrainer
from trl.experimental.sdpo import loss_utils as trl_sdpo
from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from srpo.objectives import Counts, Head, LossConfig, hidden_divergence, sdpo, srpo, topk_divergence
from srpo.objectives.batch import per_step
from srpo.objectives.divergence import divergence, with_tail

CASES = 250
ALPHAS = (0.0, 0.25, 0.5, 1.0)


def rand(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def error(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Largest difference of value and of gradient (for a random upstream gradient) as functions of `x`."""
    values, grads = [], []
    for function in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        upstream = rand(*value.shape, seed=99)
        values.append(value)
        grads.append(torch.autograd.grad((value * upstream).sum(), leaf)[0])
    return max((values[0] - values[1]).abs().max().item(), (grads[0] - grads[1]).abs().max().item())


# --- the functions of TRL's SDPO -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergence(alpha: float) -> None:
    worst = 0.0
    for seed in range(CASES):
        size, vocab = 1 + seed % 7, 2 + seed % 40
        student, teacher = rand(size, vocab, seed=seed), rand(size, vocab, seed=seed + 10_000).log_softmax(-1)
        worst = max(
            worst,
            error(
                lambda z, t=teacher: divergence(z.log_softmax(-1), t, alpha),
                lambda z, t=teacher: trl_sdpo.compute_divergence(z.log_softmax(-1), t, alpha),
                student,
            ),
        )
    print(f"compute_divergence, alpha {alpha}: {CASES} cases, largest error {worst:.1e}")
    assert worst <= 1e-9


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
def test_top_k(alpha: float, tail: bool) -> None:
    worst = 0.0
    for seed in range(CASES):
        size, vocab = 1 + seed % 7, 8 + seed % 40
        k = 1 + seed % (vocab - 2)
        student, teacher = rand(size, vocab, seed=seed), rand(size, vocab, seed=seed + 10_000)
        worst = max(
            worst,
            error(
                lambda z, t=teacher, k=k: topk_divergence(z, t, k, alpha, tail),
                lambda z, t=teacher, k=k: trl_sdpo.compute_topk_self_distillation_loss(
                    z, t, distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=tail
                ),
                student,
            ),
        )
    print(f"top-k, alpha {alpha}, tail {tail}: {CASES} cases, largest error {worst:.1e}")
    assert worst <= 1e-9


def test_tail_bucket_and_importance_clip() -> None:
    for seed in range(CASES):
        logp = rand(4, 9, seed=seed).log_softmax(-1)[:, :3]
        assert torch.equal(with_tail(logp), trl_sdpo.add_tail_bucket(logp))
        loss, new, old = (rand(4, 9, seed=seed + offset, scale=15.0) for offset in (1, 2, 3))
        clip = 1.0 + seed % 3
        theirs = trl_sdpo.apply_importance_sampling_clipping(loss, new, old, clip)
        assert torch.equal(sdpo.token_loss(loss, new, old, is_clip=clip), theirs)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_full_vocabulary_from_hidden_states(alpha: float) -> None:
    """TRL's fused kernel (float32 inside), with another width, soft-cap and scale for the teacher."""
    for seed in range(20):
        hidden, teacher_hidden = rand(13, 6, seed=seed).float(), rand(13, 9, seed=seed + 1).float()
        weight, bias = rand(50, 6, seed=seed + 2, scale=0.7).float(), rand(50, seed=seed + 3).float()
        head = Head(rand(50, 9, seed=seed + 4, scale=0.7).float(), None, 8.0, 0.9)
        results = []
        for fused in (False, True):
            leaves = tuple(x.clone().requires_grad_() for x in (hidden, weight, bias))
            h, w, b = leaves
            if fused:
                value = ChunkedDivergenceFunction.apply(
                    h, w, b, teacher_hidden, head.weight, None, alpha, 0.7, 1.1, 6.0, 0.9, 8.0
                )[0]
            else:
                own = Head(w, b, 6.0, 1.1)
                value = hidden_divergence(
                    h, own, teacher_hidden, head, alpha=alpha, top_k=None, temperature=0.7, chunk_tokens=5
                )
            grads = torch.autograd.grad(value @ rand(13, seed=99).float(), leaves)
            results.append((value, *grads))
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# --- TRL's SDPOTrainer -----------------------------------------------------------------------------------------------


def trl_sdpo_loss(case: Case) -> Tensor:
    """`SDPOTrainer._compute_self_distillation_loss` on the case's logits."""
    mode = "full_logits" if case.top_k is None else "topk_logits"
    stub = SimpleNamespace(
        args=SimpleNamespace(
            distillation_mode=mode,
            distillation_topk=case.top_k,
            distillation_alpha=case.alpha,
            distillation_add_tail=case.tail,
            distillation_is_clip=case.cfg.is_clip,
        ),
        accelerator=SimpleNamespace(gather=lambda x: x),
        _log_self_distillation_metric=lambda mode, value: None,
    )
    logits = SimpleNamespace(
        student_logits=case.logits,
        teacher_logits=case.teacher_logits,
        completion_ids=case.ids,
        loss_mask=case.mask * case.distilled.unsqueeze(1),
    )
    model = SimpleNamespace(training=True)
    inputs = {"old_per_token_logps": case.old_logp}
    return SDPOTrainer._compute_self_distillation_loss(stub, model, inputs, logits)


def test_sequence_mean_is_trls_sdpo_trainer() -> None:
    compared, worst = 0, 0.0
    for seed in range(450):
        case = ragged(seed, "sdpo")
        vocab = case.logits.shape[-1]
        case.temperature, case.sampler_ratio = 1.0, None
        if case.top_k == vocab:
            case.top_k = None  # TRL would add an empty tail of mass 1e-7
        case.weights = (case.mask * case.distilled.unsqueeze(1)).double()
        case.counts = counts(1, 1, len(case.distilled))
        case.cfg = replace(case.cfg, aggregation="sequence_mean")
        ours, theirs = sdpo.loss(case.batch(), case.cfg).loss, trl_sdpo_loss(case)
        (grad,) = torch.autograd.grad(ours, case.logits)
        (expected,) = torch.autograd.grad(theirs, case.logits)
        worst = max(worst, (ours - theirs).abs().item(), (grad - expected).abs().max().item())
        compared += bool(expected.abs().max() > 1e-4)
    print(f"SDPOTrainer: {compared} cases with gradient, largest error {worst:.1e}")
    assert compared >= 200
    assert worst <= 1e-9


# --- TRL's GRPOTrainer -----------------------------------------------------------------------------------------------


def trl_grpo(case: Case, logp: Tensor, num_items: Tensor, loss_type: str, step: dict[str, int], kl: bool) -> Any:
    """`GRPOTrainer._compute_loss` on given log-probs; returns the loss and the metrics it logged."""
    cfg, size = case.cfg, len(case.distilled)
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, torch.zeros_like(logp), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=cfg.level,
        beta=cfg.beta if kl else 0.0,
        args=SimpleNamespace(
            delta=cfg.delta, use_bias_correction_kl=False, steps_per_generation=step["steps_per_generation"]
        ),
        loss_type=loss_type,
        epsilon_low=cfg.epsilon_low,
        epsilon_high=cfg.epsilon_high,
        use_vllm=case.sampler_ratio is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=step["ranks"], gather=lambda x: x, reduce=lambda x, reduction: x, autocast=nullcontext
        ),
        current_gradient_accumulation_steps=step["accumulation"],
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    inputs = {
        "prompt_ids": torch.zeros(size, 1, dtype=torch.long),
        "prompt_mask": torch.ones(size, 1, dtype=torch.long),
        "completion_ids": case.ids,
        "completion_mask": case.mask,
        "advantages": case.advantages,
        "old_per_token_logps": case.old_logp,
        "ref_per_token_logps": case.ref_logp,
        "importance_sampling_ratio": case.sampler_ratio,
        "num_items_in_batch": num_items,
    }
    return GRPOTrainer._compute_loss(stub, None, inputs), metrics["train"]


STEPS = (
    {"ranks": 1, "accumulation": 1, "steps_per_generation": 1},
    {"ranks": 3, "accumulation": 2, "steps_per_generation": 8},
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_distilled_is_trls_dapo_bit_for_bit(dtype: torch.dtype) -> None:
    """Loss and gradient, over clips, delta, both levels, KL, sampler ratios, counts, ragged masks; no tolerance."""
    compared = 0
    for seed in range(300):
        case = ragged(seed, dtype=dtype)
        case.distilled = torch.zeros_like(case.distilled)
        case.weights = torch.zeros_like(case.weights)
        step = STEPS[seed % 2]
        num_items = case.mask.sum() * step["ranks"] * (1 + seed % 3)  # int64, as TRL gathers it
        case.cfg = replace(case.cfg, aggregation="token")
        tokens = per_step(num_items, **step)
        case.counts = Counts(tokens, torch.zeros(()), torch.tensor(float(len(case.distilled))))

        ours = srpo.loss(case.batch(), case.cfg)
        theirs, logged = trl_grpo(case, case.logp(), num_items, "dapo", step, kl=True)
        (grad,) = torch.autograd.grad(ours.loss, case.logits)
        (expected,) = torch.autograd.grad(theirs, case.logits)
        assert ours.loss.dtype == theirs.dtype
        assert torch.equal(ours.loss, theirs), f"seed {seed}"
        assert torch.equal(grad, expected), f"seed {seed}"
        compared += bool(expected.any())

        # a rank that scored rows which are not in this micro-batch passes zeros: the bits stay
        batch = replace(case.batch(), divergence=torch.zeros_like(case.old_logp, requires_grad=True))
        loss = srpo.loss(batch, case.cfg).loss
        assert torch.equal(loss, theirs)
        assert torch.equal(torch.autograd.grad(loss, case.logits)[0], expected)
        # TRL logs the share of one micro-batch; with a single column it mistakes tokens for rows
        alone = step is STEPS[0] and seed % 3 == 0 and case.cfg.level == "token"
        if alone and case.mask.any() and case.mask.shape[1] > 1:
            for end in ("low", "high"):
                share = ours.metrics[f"clip_ratio/{end}"].item()
                assert share == pytest.approx(logged[f"clip_ratio/{end}_mean"][0], abs=1e-6)
    print(f"dapo, {dtype}: {compared} cases with gradient, all bits equal")
    assert compared >= 200


def test_sequence_mean_with_nothing_distilled_is_trls_grpo() -> None:
    """TRL's `grpo` divides by the rows of a micro-batch and the accumulation steps: together the rows of the step."""
    worst, compared = 0.0, 0
    for seed in range(CASES):
        case = ragged(seed)
        case.distilled = torch.zeros_like(case.distilled)
        case.cfg = replace(case.cfg, aggregation="sequence_mean")
        step = STEPS[1]
        case.counts = counts(1, 1, len(case.distilled) * step["accumulation"])
        ours = srpo.loss(case.batch(), case.cfg).loss
        theirs, _ = trl_grpo(case, case.logp(), torch.tensor(1), "grpo", step, kl=True)
        (grad,) = torch.autograd.grad(ours, case.logits)
        (expected,) = torch.autograd.grad(theirs, case.logits)
        worst = max(worst, (ours - theirs).abs().item(), (grad - expected).abs().max().item())
        compared += bool(expected.any())
    print(f"grpo: {compared} cases with gradient, largest error {worst:.1e}")
    assert compared >= 200
    assert worst <= 1e-12


def test_a_mixed_batch_is_trls_loss_on_its_rewarded_rows_plus_sdpo_on_the_others() -> None:
    """Eq. 4.3 put together from TRL's pieces: dapo on the rewarded rows, the SDPO functions on the others."""
    compared, worst = 0, 0.0
    for seed in range(1400):
        case = ragged(seed)
        if not case.distilled.any() or case.distilled.all() or case.top_k == case.logits.shape[-1]:
            continue
        case.cfg = replace(case.cfg, aggregation="token", beta=0.0, is_clip=2.0)
        ours = srpo.loss(case.batch(), case.cfg).loss
        logp = case.logp()
        step = {"ranks": 1, "accumulation": 1, "steps_per_generation": 1}
        rewarded = replace(case, mask=case.mask * ~case.distilled.unsqueeze(1))
        theirs, _ = trl_grpo(rewarded, logp, case.counts.tokens, "dapo", step, kl=False)
        logits, teacher = case.logits / case.temperature, case.teacher_logits / case.temperature
        if case.top_k is None:
            distilled = trl_sdpo.compute_full_logit_self_distillation_loss(
                logits, teacher, distillation_alpha=case.alpha
            )
        else:
            distilled = trl_sdpo.compute_topk_self_distillation_loss(
                logits,
                teacher,
                distillation_topk=case.top_k,
                distillation_alpha=case.alpha,
                distillation_add_tail=case.tail,
            )
        distilled = trl_sdpo.apply_importance_sampling_clipping(distilled, logp, case.old_logp, 2.0)
        tis = 1.0 if case.sampler_ratio is None else case.sampler_ratio
        omega = case.mask * case.distilled.unsqueeze(1)
        theirs = theirs + (distilled * case.weights * tis * omega).sum() / case.counts.tokens
        (grad,) = torch.autograd.grad(ours, case.logits)
        (expected,) = torch.autograd.grad(theirs, case.logits)
        worst = max(worst, (ours - theirs).abs().item(), (grad - expected).abs().max().item())
        compared += 1
    print(f"mixed batches: {compared} cases, largest error {worst:.1e}")
    assert compared >= 200
    assert worst <= 1e-9


def test_the_defaults_are_the_papers() -> None:
    paper = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": None, "level": "token", "beta": 0.0, "is_clip": 2.0}
    assert LossConfig() == LossConfig(**paper, aggregation="token")
