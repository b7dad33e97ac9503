"""The student's one forward: log-probs untouched by the teacher's targets, divergence and entropy as from logits."""

import inspect

import pytest
import torch
from core_helpers import model, tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM
from trl.trainer.utils import add_fused_lm_head

from srpo.objectives import topk_divergence
from srpo.objectives.divergence import hidden_entropy, hidden_logp
from srpo.prefix.sharing import PrefixSharing
from srpo.teacher.lm_head import (
    Divergence,
    TeacherTargets,
    add_scoring_head,
    completion_hidden,
    head_of,
)
from srpo.teacher.teacher import unpatched_copy

TEMPERATURE = 0.7
T = 5
SMALL = {
    "vocab_size": 290,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def untied():
    network = model()
    twin = type(network)(type(network.config)(**{**network.config.to_dict(), "tie_word_embeddings": False}))
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    assert twin.lm_head.weight is not twin.model.embed_tokens.weight
    return twin


def softcapped():
    # 2.0 bites: a plain head would be far off
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0, attn_implementation="eager"))


def scaled():
    options = {key: value for key, value in SMALL.items() if key != "head_dim"}
    return GraniteForCausalLM(GraniteConfig(**options, logits_scaling=0.25))


NETWORKS = {"tied": model, "untied": untied, "softcapped": softcapped, "scaled": scaled}


@pytest.fixture(params=NETWORKS)
def pair(request):
    """A patched student and a plain teacher with other weights."""
    torch.manual_seed(0)
    student = NETWORKS[request.param]()
    teacher = unpatched_copy(student, {}, False).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student.eval()
    add_fused_lm_head(student, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    for network in (student, teacher):
        add_scoring_head(network, PrefixSharing(network, "off"), TEMPERATURE)
    return student, teacher


def batch():
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, len(tokenizer()), (4, 6 + T), generator=draw)
    attention = torch.ones_like(ids)
    attention[0, :3] = 0
    attention[2, -2:] = 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :-T] = -100
    omega = attention[:, -T:].bool() & torch.tensor([True, False, True, True]).unsqueeze(1)
    omega[3, 1] = False  # a token of somebody else
    return ids, attention, labels, omega


def targets(teacher, how):
    ids, attention, _, omega = batch()
    return TeacherTargets(omega, completion_hidden(teacher, ids, attention, T)[omega], head_of(teacher), how)


def run(student, **extra):
    ids, attention, labels, _ = batch()
    return student(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True, **extra)


def assert_near(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max() > 0


def plain(network):
    ids, attention, _, _ = batch()
    return network(input_ids=ids, attention_mask=attention).logits[:, -1 - T : -1] / TEMPERATURE


@pytest.mark.parametrize("how", [(0.5, 20, True), (0.0, None, True), (1.0, 20, False)])
def test_divergence_and_its_gradient_are_those_of_plain_logits(pair, how):
    student, teacher = pair
    alpha, top_k, tail = how
    _, _, _, omega = batch()
    output = run(student, targets=targets(teacher, Divergence(alpha, top_k, tail, TEMPERATURE)))
    assert output.divergence.shape == omega.shape
    assert output.divergence[~omega].abs().max() == 0 and (output.divergence[omega] > 0).all()
    weight = torch.linspace(0.5, 2, omega.numel()).view(omega.shape)
    (output.divergence * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    logits = plain(student)
    expected = topk_divergence(logits, plain(teacher).detach(), top_k, alpha, tail) * omega
    torch.testing.assert_close(output.divergence, expected, rtol=1e-5, atol=1e-6)
    (expected * weight).sum().backward()
    for name, parameter in student.named_parameters():
        assert_near(gradients[name], parameter.grad)


def test_targets_do_not_touch_log_probs_and_entropies(pair):
    student, teacher = pair
    without = run(student)
    with_targets = run(student, targets=targets(teacher, Divergence(0.5, 20, True, TEMPERATURE)))
    assert torch.equal(without.log_probs, with_targets.log_probs)
    assert torch.equal(without.entropy, with_targets.entropy)
    ids, attention, _, _ = batch()
    logp = plain(student).log_softmax(-1)
    expected = logp.gather(-1, ids[:, -T:].unsqueeze(-1)).squeeze(-1) * attention[:, -T:]
    torch.testing.assert_close(without.log_probs[:, -T:], expected, rtol=1e-5, atol=1e-5)


def test_teacher_entropy_and_log_probs_are_exact(pair):
    _, teacher = pair
    ids, attention, _, omega = batch()
    hidden = completion_hidden(teacher, ids, attention, T)[omega]
    logp = plain(teacher)[omega].log_softmax(-1)
    entropy = hidden_entropy(hidden, head_of(teacher), TEMPERATURE, chunk_tokens=4)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)
    tokens = ids[:, -T:][omega]
    chosen = hidden_logp(hidden, head_of(teacher), tokens, TEMPERATURE, chunk_tokens=4)
    torch.testing.assert_close(chosen, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), rtol=1e-5, atol=1e-5)


def test_the_probe_sees_the_gradient_at_the_hidden_states(pair):
    student, teacher = pair
    seen = []
    output = run(student, targets=targets(teacher, Divergence(0.5, 20, True, TEMPERATURE)), gradient_probe=seen.append)
    (output.log_probs.sum() + 3 * output.divergence.sum()).backward()
    with_probe = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    # By hand: the same sum as a function of the hidden states alone.
    ids, attention, _, omega = batch()
    states = []
    hook = student.base_model.register_forward_hook(lambda _m, _a, out: states.append(out.last_hidden_state))
    logits = plain(student)
    hook.remove()
    divergence = topk_divergence(logits, plain(teacher).detach(), 20, 0.5) * omega
    chosen = logits.log_softmax(-1).gather(-1, ids[:, -T:].unsqueeze(-1)).squeeze(-1) * attention[:, -T:]
    total = chosen.sum() + 3 * divergence.sum()
    (expected,) = torch.autograd.grad(total, states[0], retain_graph=True)
    assert len(seen) == 1
    _, _, labels, _ = batch()
    assert_near(seen[0], expected[:, :-1][labels[:, 1:] != -100])
    total.backward()
    for name, parameter in student.named_parameters():  # probing changes nothing
        assert_near(with_probe[name], parameter.grad)


def test_generation_still_works_and_keeps_its_signature(pair):
    student, teacher = pair
    unpatched = unpatched_copy(teacher, {}, False)
    unpatched.load_state_dict(student.state_dict())
    ids = batch()[0][1:2, :6]
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(student.generate(ids, **options), unpatched.eval().generate(ids, **options))
    with pytest.raises(ValueError, match="nonsense"):
        student.generate(ids, nonsense=1, **options)
    assert "input_ids" in inspect.signature(student.forward).parameters


def test_a_head_with_a_bias():
    torch.manual_seed(0)
    network = untied()
    network.lm_head = torch.nn.Linear(32, 290, bias=True)
    network.eval()
    add_scoring_head(network, PrefixSharing(network, "off"))
    ids, attention, _, _ = batch()
    hidden = completion_hidden(network, ids, attention, T)
    torch.testing.assert_close(head_of(network).logits(hidden), plain(network) * TEMPERATURE, rtol=1e-5, atol=1e-5)


def test_no_position_is_projected_for_the_teacher():
    network = model().eval()
    add_scoring_head(network, PrefixSharing(network, "off"))
    widths: list[int] = []
    network.lm_head.register_forward_hook(lambda _m, args, _out: widths.append(args[0].shape[1]))
    ids, attention, _, _ = batch()
    completion_hidden(network, ids, attention, T)
    assert not widths
