"""A distilled decision is compared with its teacher's among its choices only; other tokens as ever."""

import math
from typing import Any

import pytest
import torch
from test_objectives_divergence import Largest, rand
from torch import Tensor

from srpo.objectives import Head, entropy_weights, hidden_divergence, topk_divergence
from srpo.objectives.divergence import hidden_entropy, hidden_logp

TAU = 0.7
LN2 = math.log(2)

# One hidden unit, h = 1: the logits are the weights. Choices {0, 2}; word 1 is likely, but was not allowed.
#   student ln 3, 9, 0 -> 3/4, 1/4           teacher 0, -9, 0 -> 1/2, 1/2
STUDENT = torch.tensor([[math.log(3)], [9.0], [0.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0], [-9.0], [0.0]], dtype=torch.float64)
ONE, CHOICES = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0, 2, -1]])


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)),  # = ln(4/3) / 2
        (1.0, 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)),
        # the mixture is 5/8, 3/8
        (0.5, (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)) / 2),
    ],
)
def test_two_choices_by_hand(alpha: float, expected: float) -> None:
    got = hidden_divergence(ONE, Head(STUDENT), ONE, Head(TEACHER), alpha=alpha, top_k=None, choices=CHOICES)
    assert got.tolist() == pytest.approx([expected], abs=1e-12)


def test_the_temperature_divides_both_by_hand() -> None:
    # At tau = 1/2 the odds are squared: 9/10, 1/10 against 1/2, 1/2.
    got = hidden_divergence(
        ONE, Head(STUDENT), ONE, Head(TEACHER), alpha=1.0, top_k=None, choices=CHOICES, temperature=0.5
    )
    assert got.tolist() == pytest.approx([0.9 * math.log(1.8) + 0.1 * math.log(0.2)], abs=1e-12)


def test_entropies_log_probs_and_weights_by_hand() -> None:
    hidden, choices = ONE.expand(3, 1), torch.tensor([[0, 2, -1], [2, -1, -1], [-1, -1, -1]])
    entropy = hidden_entropy(hidden, Head(STUDENT), 1.0, choices)
    total = 3 + math.exp(9) + 1
    everything = -sum(p * math.log(p) for p in (3 / total, math.exp(9) / total, 1 / total))
    two = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert entropy.tolist() == pytest.approx([two, 0.0, everything], abs=1e-12)
    logp = hidden_logp(hidden, Head(STUDENT), torch.tensor([2, 2, 2]), 1.0, choices)
    assert logp.tolist() == pytest.approx([math.log(0.25), 0.0, -math.log(total)], abs=1e-12)
    # A teacher that is undecided between two has H = ln 2, weight 1/2 beside a certain one's 1: over their mean 3/4.
    undecided = hidden_entropy(ONE.expand(2, 1), Head(TEACHER), 1.0, choices[:2])
    weights = entropy_weights(undecided.view(1, 2), torch.ones(1, 2).bool(), 1.0)
    assert undecided.tolist() == pytest.approx([LN2, 0.0]) and weights[0].tolist() == pytest.approx([2 / 3, 4 / 3])


def mixed() -> tuple[Tensor, Head, Tensor, Head, Tensor]:
    """13 tokens of a soft-capped student and of a wider teacher: 4 of them free, the others with 1 to 4 choices."""
    student = Head(rand(11, 5, seed=20).requires_grad_(), rand(11, seed=21).requires_grad_(), softcap=3.0, scale=0.7)
    teacher = Head(rand(11, 8, seed=22), rand(11, seed=23), None, 1.3)
    choices = torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(n))[:4] for n in range(13)])
    for n in range(13):
        choices[n, n % 5 :] = -1
    choices[4, :], choices[9, 3] = -1, -1
    return rand(13, 5, seed=24).requires_grad_(), student, rand(13, 8, seed=25), teacher, choices


def masked(logits: Tensor, choices: Tensor) -> Tensor:
    """Full logits with -inf at what was not allowed."""
    kept = torch.zeros_like(logits).bool()
    for row, allowed in zip(kept, choices, strict=True):
        row[allowed[allowed >= 0] if (allowed >= 0).any() else slice(None)] = True
    return logits.masked_fill(~kept, -torch.inf)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_it_is_the_divergence_of_masked_full_logits(alpha: float, chunk: int) -> None:
    hidden, student, teacher_hidden, teacher, choices = mixed()
    leaves = (hidden, student.weight, student.bias)
    got = hidden_divergence(
        hidden, student, teacher_hidden, teacher,
        alpha=alpha, top_k=None, temperature=TAU, choices=choices, chunk_tokens=chunk,
    )  # fmt: skip
    own, other = (masked(head.logits(h) / TAU, choices) for head, h in ((student, hidden), (teacher, teacher_hidden)))
    expected = topk_divergence(own, other, None, alpha)
    assert torch.allclose(got, expected, atol=1e-12)
    upstream = rand(13, seed=26)
    for a, b in zip(
        torch.autograd.grad(got @ upstream, leaves), torch.autograd.grad(expected @ upstream, leaves), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        logp = masked(teacher.logits(teacher_hidden) / TAU, choices).log_softmax(-1)
        assert torch.allclose(
            hidden_entropy(teacher_hidden, teacher, TAU, choices, chunk), torch.special.entr(logp.exp()).sum(-1)
        )
        tokens = choices[:, 0].clamp(min=0)
        assert torch.allclose(
            hidden_logp(teacher_hidden, teacher, tokens, TAU, choices, chunk), logp.gather(1, tokens[:, None])[:, 0]
        )


def test_tokens_without_restriction_keep_their_value_and_their_top_k() -> None:
    hidden, student, teacher_hidden, teacher, choices = mixed()
    how: dict[str, Any] = {"alpha": 0.5, "top_k": 4, "temperature": TAU}
    plain = hidden_divergence(hidden, student, teacher_hidden, teacher, **how)
    assert torch.equal(
        hidden_divergence(hidden, student, teacher_hidden, teacher, choices=torch.full_like(choices, -1), **how), plain
    )
    free = (choices < 0).all(-1)
    whole = hidden_divergence(
        hidden, student, teacher_hidden, teacher, choices=choices, alpha=0.5, top_k=None, temperature=TAU
    )
    one = hidden_divergence(
        hidden, student, teacher_hidden, teacher, choices=choices, alpha=0.5, top_k=1, temperature=TAU
    )
    assert torch.allclose(one[~free], whole[~free], atol=1e-14), "a decision's support is all of its choices"
    assert (one[free] - whole[free]).abs().min() > 1e-3
    got = hidden_divergence(hidden, student, teacher_hidden, teacher, choices=choices, **how)
    assert free.sum() == 4 and torch.allclose(got[free], plain[free], atol=1e-14)
    assert (got[~free] - plain[~free]).abs().max() > 0.1


def test_words_that_were_not_allowed_get_no_gradient_at_all() -> None:
    hidden, student, teacher_hidden, teacher, choices = mixed()
    for n in range(13):
        value = hidden_divergence(
            hidden, student, teacher_hidden, teacher, alpha=0.5, top_k=None, temperature=TAU, choices=choices
        )[n]
        weight, bias = torch.autograd.grad(value, (student.weight, student.bias))
        allowed = choices[n][choices[n] >= 0].tolist()
        if len(allowed) == 1:
            allowed = []  # certain: nothing to learn
        if allowed or (choices[n] >= 0).any():
            assert weight.abs().sum(-1).nonzero().flatten().tolist() == sorted(allowed), n
            assert bias.nonzero().flatten().tolist() == sorted(allowed), n
        else:
            assert (weight.abs().sum(-1) > 0).all()


def test_only_the_rows_of_the_choices_are_read() -> None:
    """No [N,V] = 1600, and no [N,A,D] = 576 either: three ids occur, and the gradient of the head is [V,D] = 300."""
    tokens, vocab, dim, width = 32, 50, 6, 3
    hidden = rand(tokens, dim, seed=1).requires_grad_()
    student, teacher = Head(rand(vocab, dim, seed=2).requires_grad_()), Head(rand(vocab, dim, seed=3))
    choices = torch.tensor([[7, 9, -1]]).repeat(tokens, 1)
    assert choices.size(1) == width
    with Largest() as largest:
        value = hidden_divergence(
            hidden, student, rand(tokens, dim, seed=4), teacher, alpha=0.5, top_k=20, choices=choices
        )
        hidden_entropy(hidden, student, TAU, choices)
        hidden_logp(hidden, student, choices[:, 0], TAU, choices)
        value.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert largest.numel == vocab * dim
