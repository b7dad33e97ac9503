"""Divergences: numbers by hand, bounds, gradients, chunking and its memory, hostile logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srpo.objectives import Head, hidden_divergence, sampled_token_divergence, topk_divergence
from srpo.objectives.divergence import divergence, with_tail

torch.set_num_threads(1)
ALPHAS = (0.0, 0.25, 0.5, 1.0)


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


# --- numbers by hand -------------------------------------------------------------------------------------------------

# student p = (1/2, 1/2), teacher q = (1/4, 3/4)
# forward  KL(q||p) = 1/4 ln(1/2) + 3/4 ln(3/2)           = -0.1732867951 + 0.3040988311 = 0.1308120360
# reverse  KL(p||q) = 1/2 ln 2 + 1/2 ln(2/3)              =  0.3465735903 - 0.2027325541 = 0.1438410362
# JS, m = (3/8, 5/8):  KL(p||m) = 1/2 ln(4/3) + 1/2 ln(4/5) = 0.1438410362 - 0.1115717757 = 0.0322692605
#                      KL(q||m) = 1/4 ln(2/3) + 3/4 ln(6/5) = -0.1013662770 + 0.1367411677 = 0.0353748906
#                      1/2 of their sum                                                     = 0.0338220756
GOLDEN = {0.0: 0.1308120360, 1.0: 0.1438410362, 0.5: 0.0338220756}


@pytest.mark.parametrize("alpha", GOLDEN)
def test_two_words_by_hand(alpha: float) -> None:
    value = divergence(logs(1 / 2, 1 / 2), logs(1 / 4, 3 / 4), alpha)
    assert value.item() == pytest.approx(GOLDEN[alpha], abs=1e-9)


@pytest.mark.parametrize("alpha", GOLDEN)
def test_top_one_with_tail_is_the_two_word_case(alpha: float) -> None:
    # p = (.5, .3, .2): the student's best word and the rest are (1/2, 1/2); q = (.25, .35, .4) gives (1/4, 3/4)
    value = topk_divergence(logs(0.5, 0.3, 0.2), logs(0.25, 0.35, 0.4), 1, alpha, tail=True)
    assert value.item() == pytest.approx(GOLDEN[alpha], abs=1e-9)


@pytest.mark.parametrize("alpha", GOLDEN)
def test_top_two_without_tail_is_renormalised(alpha: float) -> None:
    # p = (.1, .45, .45) keeps words 1 and 2: (1/2, 1/2); q = (.6, .1, .3) there: (.1, .3)/.4 = (1/4, 3/4)
    value = topk_divergence(logs(0.1, 0.45, 0.45), logs(0.6, 0.1, 0.3), 2, alpha, tail=False)
    assert value.item() == pytest.approx(GOLDEN[alpha], abs=1e-9)


def test_skewed_mixture_by_hand() -> None:
    # alpha = 1/4: m = 3/4 (1/2, 1/2) + 1/4 (1/4, 3/4) = (7/16, 9/16)
    # KL(p||m) = 1/2 ln(8/7) + 1/2 ln(8/9)  = 0.0667656963 - 0.0588915178 = 0.0078741785
    # KL(q||m) = 1/4 ln(4/7) + 3/4 ln(4/3)  = -0.1399039470 + 0.2157615543 = 0.0758576073
    # 3/4 * 0.0078741785 + 1/4 * 0.0758576073 = 0.0059056339 + 0.0189644018 = 0.0248700357
    value = divergence(logs(1 / 2, 1 / 2), logs(1 / 4, 3 / 4), 0.25)
    assert value.item() == pytest.approx(0.0248700357, abs=1e-9)


def test_tail_is_the_missing_mass() -> None:
    assert torch.allclose(with_tail(logs(0.5, 0.3)).exp(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


def test_tail_of_a_full_support_is_tiny_finite_and_has_no_gradient() -> None:
    # nothing is missing: the clamp leaves log(1 - e^-1e-7) = ln(1e-7) = -16.118, with zero slope
    logp = logs(0.75, 0.25).requires_grad_()
    tail = with_tail(logp)[-1]
    assert tail.item() == pytest.approx(-16.118095, abs=1e-5)
    tail.backward()
    assert torch.equal(logp.grad, torch.zeros(2, dtype=torch.float64))


def test_temperature_scale_bias_and_softcap_of_a_head_by_hand() -> None:
    # W h + b = 2*3 + 1 = 7; scale 1/2 -> 3.5; softcap 5 -> 5 tanh(0.7) = 5 * 0.6043677771 = 3.0218388857
    head = Head(torch.tensor([[2.0]]), torch.tensor([1.0]), softcap=5.0, scale=0.5)
    assert head.logits(torch.tensor([[3.0]])).item() == pytest.approx(3.0218388857, abs=1e-6)
    # student logits (2 ln 3, 0) at temperature 2 are (ln 3, 0): p = (3/4, 1/4); teacher uniform; reverse KL =
    # 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308120360
    student = Head(torch.tensor([[2 * math.log(3)], [0.0]], dtype=torch.float64))
    teacher = Head(torch.zeros(2, 1, dtype=torch.float64))
    one = torch.ones(1, 1, dtype=torch.float64)
    value = hidden_divergence(one, student, one, teacher, alpha=1.0, top_k=None, temperature=2.0)
    assert value.item() == pytest.approx(0.1308120360, abs=1e-9)


# --- bounds and identities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_bounds(alpha: float) -> None:
    """0 <= JS <= ln 2 (its entropy of mixing in general), also for nearly disjoint distributions."""
    student, teacher = rand(500, 40, seed=1, scale=8.0), rand(500, 40, seed=2, scale=8.0)
    value = topk_divergence(student, teacher, None, alpha)
    bound = -(alpha * math.log(alpha) + (1 - alpha) * math.log(1 - alpha))  # ln 2 at 1/2
    assert value.min() >= -1e-12
    assert value.max() <= bound + 1e-12
    assert value.max() > 0.8 * bound  # the bound was approached, so the test could have failed


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_with_tail_is_never_above_the_exact_value(alpha: float, k: int) -> None:
    student, teacher = rand(300, 30, seed=3), rand(300, 30, seed=4)
    exact = topk_divergence(student, teacher, None, alpha)
    coarse = topk_divergence(student, teacher, k, alpha)
    assert (coarse <= exact + 1e-12).all()
    assert (coarse < 0.99 * exact).any()


def test_without_the_tail_there_is_no_such_bound() -> None:
    student, teacher = rand(300, 30, seed=3), rand(300, 30, seed=4)
    exact, cut = (topk_divergence(student, teacher, k, 0.5, tail=False) for k in (None, 10))
    assert (cut > exact).any()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("tail", [True, False])
def test_k_equal_to_the_vocabulary_is_exact(alpha: float, tail: bool) -> None:
    student, teacher = rand(20, 12, seed=5), rand(20, 12, seed=6)
    exact = topk_divergence(student, teacher, None, alpha)
    for k in (12, 13):
        assert torch.equal(topk_divergence(student, teacher, k, alpha, tail), exact)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_teacher_equal_to_student_is_zero_with_zero_gradient(alpha: float, top_k: int | None) -> None:
    logits = rand(30, 20, seed=7, scale=3.0).requires_grad_()
    value = topk_divergence(logits, logits.detach(), top_k, alpha)
    value.sum().backward()
    assert value.abs().max() <= 1e-14
    assert logits.grad.abs().max() <= 1e-14


def test_swapping_the_arguments_swaps_forward_and_reverse() -> None:
    a, b = rand(50, 9, seed=8).log_softmax(-1), rand(50, 9, seed=9).log_softmax(-1)
    assert torch.equal(divergence(a, b, 0.0), divergence(b, a, 1.0))
    assert torch.allclose(divergence(a, b, 0.5), divergence(b, a, 0.5), atol=1e-14)


def test_jensen_shannon_is_a_quarter_of_the_kl_to_second_order() -> None:
    a = rand(200, 30, seed=10)
    b = a + 1e-3 * rand(200, 30, seed=11)
    ratio = topk_divergence(a, b, None, 0.5) / topk_divergence(a, b, None, 1.0)
    # the JS of 1/2 and 1/2 is KL/8 + KL/8 of the halved difference: 1/2 * (1/4 + 1/4) = 1/4
    assert torch.allclose(ratio, torch.full_like(ratio, 0.25), atol=1e-3)


def test_reverse_kl_gradient_is_the_policy_gradient() -> None:
    """Eq. 3.2: grad = E_{y ~ p}[ log(p(y)/q(y)) grad log p(y) ], and the sampled-token estimator's expectation."""
    logits, teacher = rand(15, seed=12).requires_grad_(), rand(15, seed=13).log_softmax(-1)
    (exact,) = torch.autograd.grad(topk_divergence(logits, teacher, None, 1.0), logits)
    logp = logits.log_softmax(-1)
    p = logp.detach().exp()
    (policy,) = torch.autograd.grad((p * (logp.detach() - teacher) * logp).sum(), logits, retain_graph=True)
    (sampled,) = torch.autograd.grad((p * sampled_token_divergence(logp, teacher)).sum(), logits)
    assert torch.allclose(exact, policy, atol=1e-14)
    assert torch.allclose(exact, sampled, atol=1e-14)
    assert exact.abs().max() > 1e-2


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_alpha_outside_the_unit_interval_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        divergence(logs(0.5, 0.5), logs(0.5, 0.5), bad)


# --- hidden states, chunks, memory -----------------------------------------------------------------------------------


def heads(vocab: int = 11, student: int = 5, teacher: int = 8) -> tuple[Head, Head]:
    """A student head that is trained and a wider teacher head, as a trust-region teacher has."""
    own = Head(rand(vocab, student, seed=20).requires_grad_(), rand(vocab, seed=21).requires_grad_(), 3.0, 0.7)
    return own, Head(rand(vocab, teacher, seed=22), rand(vocab, seed=23), None, 1.3)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("top_k", "tail"), [(None, True), (4, True), (4, False)])
def test_chunks_do_not_change_value_or_gradient(alpha: float, top_k: int | None, tail: bool) -> None:
    student, teacher = heads()
    hidden, teacher_hidden = rand(13, 5, seed=24).requires_grad_(), rand(13, 8, seed=25)
    leaves = (hidden, student.weight, student.bias)
    upstream = rand(13, seed=26)
    whole = topk_divergence(
        student.logits(hidden) / 0.7, teacher.logits(teacher_hidden) / 0.7, top_k, alpha, tail
    )  # no chunk, no recomputation
    expected = torch.autograd.grad(whole @ upstream, leaves)
    for chunk in (1, 4, 13, 100):
        value = hidden_divergence(
            hidden,
            student,
            teacher_hidden,
            teacher,
            alpha=alpha,
            top_k=top_k,
            tail=tail,
            temperature=0.7,
            chunk_tokens=chunk,
        )
        assert torch.allclose(value, whole, atol=1e-13)
        for got, want in zip(torch.autograd.grad(value @ upstream, leaves), expected, strict=True):
            assert torch.allclose(got, want, atol=1e-13)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("top_k", "tail"), [(None, True), (3, True), (3, False)])
def test_gradcheck(alpha: float, top_k: int | None, tail: bool) -> None:
    teacher_hidden, teacher = rand(4, 8, seed=25), heads()[1]

    def value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, softcap=3.0, scale=0.7)
        return hidden_divergence(
            hidden, head, teacher_hidden, teacher, alpha=alpha, top_k=top_k, tail=tail, temperature=0.7, chunk_tokens=3
        )

    leaves = (rand(4, 5, seed=24), rand(11, 5, seed=20), rand(11, seed=21))
    assert torch.autograd.gradcheck(value, tuple(x.requires_grad_() for x in leaves))


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = heads()
    teacher = Head(teacher.weight.requires_grad_(), teacher.bias.requires_grad_())
    teacher_hidden = rand(6, 8, seed=25).requires_grad_()
    hidden = rand(6, 5, seed=24).requires_grad_()
    hidden_divergence(hidden, student, teacher_hidden, teacher, alpha=0.5, top_k=3).sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert teacher_hidden.grad is None
    assert teacher.weight.grad is None
    assert teacher.bias.grad is None


def test_trust_region_teacher_is_a_head_on_concatenated_states() -> None:
    """logits_q = (1-tau) logits_ref + tau logits_live, as one projection of [h_ref, h_live]."""
    ref, live, tau = rand(11, 5, seed=30), rand(11, 5, seed=31), 0.05
    h_ref, h_live, hidden = (rand(6, 5, seed=s) for s in (32, 33, 34))
    mixed = Head(torch.cat([(1 - tau) * ref, tau * live], dim=1))
    value = hidden_divergence(hidden, Head(live), torch.cat([h_ref, h_live], 1), mixed, alpha=0.5, top_k=None)
    logits = (1 - tau) * h_ref @ ref.T + tau * h_live @ live.T
    assert torch.allclose(value, topk_divergence(hidden @ live.T, logits, None, 0.5), atol=1e-14)


def test_no_rows_give_an_empty_result_that_backward_accepts() -> None:
    student, teacher = heads()
    hidden = rand(0, 5).requires_grad_()
    value = hidden_divergence(hidden, student, rand(0, 8), teacher, alpha=0.5, top_k=3)
    assert value.shape == (0,)
    value.sum().backward()
    assert torch.equal(student.weight.grad, torch.zeros_like(student.weight))


def test_token_counts_must_agree() -> None:
    student, teacher = heads()
    with pytest.raises(ValueError, match="6 student tokens but 5 teacher"):
        hidden_divergence(rand(6, 5), student, rand(5, 8), teacher, alpha=0.5, top_k=3)


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation made, in forward, recomputation and backward."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("top_k", [None, 5])
def test_logits_of_all_tokens_never_exist(top_k: int | None) -> None:
    tokens, vocab, dim, chunk = 96, 50, 6, 8
    hidden = rand(tokens, dim, seed=1).requires_grad_()
    student, teacher = Head(rand(vocab, dim, seed=2).requires_grad_()), Head(rand(vocab, dim, seed=3))
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = hidden_divergence(
                hidden, student, rand(tokens, dim, seed=4), teacher, alpha=0.5, top_k=top_k, chunk_tokens=chunk
            )
        value.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert max(saved) <= max(tokens * dim, vocab * dim)  # nothing with a vocabulary axis per token is kept
    # two chunks side by side (the mixture) are the largest thing ever made: 800 of the 4,800 numbers of [N,V]
    assert largest.numel <= 2 * chunk * vocab < tokens * vocab


@pytest.mark.parametrize(("vocab", "size"), [(64, 2048), (32_000, 4), (151_936, 1)])
def test_chunks_have_a_size_in_bytes(monkeypatch: pytest.MonkeyPatch, vocab: int, size: int) -> None:
    """2 MiB for four copies of [n,V] in fp32: n V <= 131,072, and one token at least."""
    monkeypatch.setattr("srpo.objectives.divergence.CHUNK_BYTES", 2**21)
    chunks = list(Head(torch.zeros(vocab, 1)).chunks(5000, copies=4))
    assert chunks[0] == slice(0, size) and len(chunks) == math.ceil(5000 / size) and chunks[-1].stop >= 5000


def test_a_sharded_head_is_gathered_for_forward_and_for_recomputation() -> None:
    """A weight that exists only inside `gather`, as under ZeRO-3, gives the same value and gradient."""
    student, teacher = heads()
    hidden, teacher_hidden = rand(7, 5, seed=24), rand(7, 8, seed=25)

    def run(own: Head) -> tuple[Tensor, Tensor, Tensor]:
        h = hidden.clone().requires_grad_()
        value = hidden_divergence(h, own, teacher_hidden, teacher, alpha=0.5, top_k=4, chunk_tokens=3)
        value.sum().backward()
        return value, h.grad, own.weight.grad

    full = student.weight.detach().clone()
    expected = run(Head(full.clone().requires_grad_(), student.bias))
    weight = full.clone().requires_grad_()
    calls = 0

    @contextmanager
    def gather() -> Iterator[None]:
        nonlocal calls
        calls += 1
        weight.data = full.clone()
        yield
        weight.data = torch.empty(0, dtype=full.dtype)

    weight.data = torch.empty(0, dtype=full.dtype)
    h = hidden.clone().requires_grad_()
    value = hidden_divergence(
        h, Head(weight, student.bias, gather=gather), teacher_hidden, teacher, alpha=0.5, top_k=4, chunk_tokens=3
    )
    grad, weight_grad = torch.autograd.grad(value.sum(), (h, weight))
    assert calls == 2  # however many chunks
    assert torch.equal(value, expected[0])
    assert torch.equal(grad, expected[1])
    assert torch.equal(weight_grad, expected[2])


# --- hostile numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_forbidden_words_are_finite(alpha: float, top_k: int | None) -> None:
    """-inf logits (suppressed or padded words) of the teacher, of the student, and of both."""
    student, teacher = rand(6, 8, seed=40), rand(6, 8, seed=41)
    teacher[0:4, 2] = -math.inf
    teacher[1, 3:7] = -math.inf
    student[2:6, 2] = -math.inf
    student.requires_grad_()
    value = topk_divergence(student, teacher, top_k, alpha)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_teacher_that_forbids_the_whole_support_is_finite(alpha: float) -> None:
    student, teacher = rand(4, 8, seed=48), rand(4, 8, seed=49)
    teacher.scatter_(1, student.topk(3).indices, -math.inf)
    student.requires_grad_()
    value = topk_divergence(student, teacher, 3, alpha, tail=False)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_word_that_both_forbid_changes_nothing(alpha: float) -> None:
    student, teacher = rand(6, 8, seed=42), rand(6, 8, seed=43)
    forbidden = torch.full((6, 1), -math.inf, dtype=torch.float64)
    wider = topk_divergence(torch.cat([student, forbidden], 1), torch.cat([teacher, forbidden], 1), None, alpha)
    assert torch.allclose(wider, topk_divergence(student, teacher, None, alpha), atol=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("top_k", [None, 20])
def test_bfloat16_inputs_are_scored_in_float32(alpha: float, top_k: int | None) -> None:
    # small weights: log(1 - captured mass) loses digits in float32 when the tail is below 1e-4, whoever computes it
    hidden = rand(9, 16, seed=44).bfloat16().requires_grad_()
    student = Head(rand(64, 16, seed=45, scale=0.3).bfloat16().requires_grad_())
    teacher_hidden, teacher = rand(9, 16, seed=46).bfloat16(), Head(rand(64, 16, seed=47, scale=0.3).bfloat16())
    value = hidden_divergence(hidden, student, teacher_hidden, teacher, alpha=alpha, top_k=top_k)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert torch.isfinite(hidden.grad).all()
    # the projection rounds to bfloat16 (that is the model's own arithmetic), everything after it must not
    exact = topk_divergence(
        (hidden @ student.weight.T).double(), (teacher_hidden @ teacher.weight.T).double(), top_k, alpha
    )
    assert torch.allclose(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_confident_models_in_float32_stay_finite() -> None:
    """Logits of +-200: the captured mass is 1 in float32, so the tail sits at its clamp on both sides."""
    student = torch.tensor([[200.0, -200.0, 0.0, -10.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 200.0, 0.0, -10.0]])
    for alpha in ALPHAS:
        value = topk_divergence(student, teacher, 2, alpha)
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(value).all()
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize(("alpha", "end"), [(1e-4, 0.0), (1 - 1e-4, 1.0)])
def test_the_ends_of_alpha_are_not_the_limits_of_the_middle(alpha: float, end: float) -> None:
    """To first order D_alpha = alpha KL(teacher || student) near 0, and (1 - alpha) KL(student || teacher) near 1."""
    s = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    t = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    share = divergence(s, t, alpha) / divergence(s, t, end)
    assert share.item() == pytest.approx(1e-4, rel=1e-2)
