"""Masked decisions: probabilities over the choices only, the same in every pass; without choices TRL's numbers."""

import math
from typing import Any

import core_helpers as core
import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from srpo.objectives import Head
from srpo.prefix.sharing import PrefixSharing
from srpo.teacher.lm_head import add_scoring_head
from srpo.teacher.masked_decisions import choice_log_probs, score_choices, scored_among

TAU = 0.7


def test_by_hand() -> None:
    # logits W h = [1, 2, 3, 0] with h = 1; choices {0, 2}: exp(1), exp(3) -> p(2) = e^2 / (1 + e^2) at tau 1
    head = Head(torch.tensor([[1.0], [2.0], [3.0], [0.0]], dtype=torch.float64))
    hidden = torch.ones(2, 1, dtype=torch.float64)
    choices = torch.tensor([[0, 2, -1], [3, 1, 2]])
    p = choice_log_probs(hidden, head, choices, 1.0).exp()
    e = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).exp()
    assert p[0].tolist() == pytest.approx([(1 / (1 + e[2])).item(), (e[2] / (1 + e[2])).item(), 0.0])
    assert p[1].tolist() == pytest.approx([(x / (e[0] + e[2] + e[3])).item() for x in (e[0], e[2], e[3])])
    logp, entropy = score_choices(hidden, head, choices, torch.tensor([2, 3]), 1.0)
    assert logp.tolist() == pytest.approx([p[0, 1].log().item(), p[1, 0].log().item()])
    q = p[0, 0].item()
    assert entropy[0].item() == pytest.approx(-q * math.log(q) - (1 - q) * math.log(1 - q))


@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (5.0, 0.5, True)])
def test_sums_to_one_and_agrees_with_masked_full_logits(softcap: float | None, scale: float, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    head = Head(weight, torch.randn(50, generator=generator, dtype=torch.float64) if bias else None, softcap, scale)
    hidden = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    choices = torch.stack([torch.randperm(50, generator=generator)[:4] for _ in range(20)])
    choices[::3, 2:] = -1
    logp = choice_log_probs(hidden, head, choices, TAU)
    assert logp.exp().sum(-1).tolist() == pytest.approx([1.0] * 20, abs=1e-12)
    full = torch.full((20, 50), -torch.inf, dtype=torch.float64)
    logits = head.logits(hidden) / TAU
    for n in range(20):
        ids = choices[n][choices[n] >= 0]
        full[n, ids] = logits[n, ids]
    expected = full.log_softmax(-1).gather(-1, choices.clamp(min=0))
    assert torch.allclose(logp[choices >= 0], expected[choices >= 0], atol=1e-12)


def test_gradient_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    choices = torch.tensor([[0, 4, -1], [8, 2, 1], [5, -1, -1], [7, 0, 3]])
    tokens = torch.tensor([4, 8, 5, 3])

    def score(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return score_choices(h, Head(w), choices, tokens, TAU)

    assert torch.autograd.gradcheck(score, (hidden, weight))


def test_an_action_that_was_not_allowed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decision 1: token 3 is not among its choices \[0, 2\]"):
        score_choices(torch.ones(2, 1), Head(torch.ones(4, 1)), torch.tensor([[0, 2]] * 2), torch.tensor([0, 3]), 1.0)


def network() -> Any:
    made = core.model(layers=2)
    add_fused_lm_head(made, temperature=TAU, outputs=("log_probs", "entropy"))
    return made


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, attention and labels of two rows with left and right padding, and choices of their last four tokens."""
    ids = torch.arange(20, 38).view(2, 9)
    attention = torch.ones_like(ids)
    attention[1, 0] = 0
    attention[1, -1] = 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :-4] = -100
    choices = torch.full((2, 4, 3), -1)
    choices[0, 1] = torch.tensor([int(ids[0, -3]), 11, 12])
    choices[0, 3, :2] = torch.tensor([13, int(ids[0, -1])])
    choices[1, 2, :1] = ids[1, -2]
    return ids, attention, labels, choices


def test_the_model_scores_decisions_among_their_choices_and_the_rest_as_ever() -> None:
    made, (ids, attention, labels, choices) = network(), batch()
    with torch.no_grad():
        before = made(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
        logits = made(input_ids=ids, attention_mask=attention).logits[:, -5:-1] / TAU
    add_scoring_head(made, PrefixSharing(made, "off"), TAU)
    with torch.no_grad():
        plain = made(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
        with scored_among(made, choices):
            masked = made(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
    assert torch.equal(plain.log_probs, before.log_probs) and torch.equal(plain.entropy, before.entropy)
    free = torch.ones(2, 4, dtype=torch.bool)
    free[0, 1] = free[0, 3] = free[1, 2] = False
    got = masked.log_probs[:, -4:]
    assert torch.equal(got[free], before.log_probs[:, -4:][free])
    for b, t in ((0, 1), (0, 3), (1, 2)):
        allowed = choices[b, t][choices[b, t] >= 0]
        logp = logits[b, t, allowed].log_softmax(-1)
        expected = logp[(allowed == ids[b, t - 4]).nonzero()[0, 0]]
        assert got[b, t].item() == pytest.approx(expected.item(), abs=1e-5)
        assert masked.entropy[b, t - 4].item() == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-5)
    assert got[1, 2].item() == 0.0  # one choice: certain


def test_gradients_of_decisions_stay_among_their_choices() -> None:
    made, (ids, attention, labels, choices) = network(), batch()
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())  # untied, to see the head alone
    add_scoring_head(made, PrefixSharing(made, "off"), TAU)
    with scored_among(made, choices):
        out = made(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True)
    out.log_probs[0, -3].backward()
    touched = made.lm_head.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert sorted(touched) == sorted(choices[0, 1].tolist())
