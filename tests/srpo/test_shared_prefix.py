"""Rows that share their beginnings say what plain rows say: log-probs, entropies, divergences, gradients."""

import logging
import re
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from prefix_cases import FAMILIES, LENGTH, TEMPERATURE, apart, batch, build, gradients, score, shared

from srpo.teacher.lm_head import Divergence, TeacherTargets, completion_hidden, head_of
from srpo.teacher.masked_decisions import scored_among

NEAR = 1e-5


@pytest.fixture(autouse=True)
def once() -> None:
    transformers.utils.logging.get_logger("srpo.prefix.sharing").warning_once.cache_clear()


class Spy:
    """Which passes of a backbone were packed: the shapes that it was given."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        backbone = model.base_model

        def look(_module: Any, args: Any, kwargs: Any) -> None:
            self.shapes.append(tuple(kwargs["input_ids"].shape))

        backbone.register_forward_pre_hook(look, with_kwargs=True)

    @property
    def last_packed(self) -> bool:
        return self.shapes[-1] != tuple(batch()[0].shape)


def near_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float = NEAR) -> None:
    """Each tensor by its own size; those that are 0 but for rounding by that of the largest."""
    assert actual.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        size = max(float(one.abs().max()), 1e-2 * largest)
        assert float((actual[name] - one).abs().max()) <= within * size, name


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_entropies_and_gradients_are_those_of_plain_rows(family: str) -> None:
    plain, packed = build(family), build(family)
    sharing, spy = shared(packed), Spy(packed)
    expected, actual = score(plain), score(packed)
    assert spy.last_packed and sharing._refused is None
    assert actual.log_probs.shape == expected.log_probs.shape and torch.equal(actual.label_mask, expected.label_mask)
    assert (expected.log_probs != 0).sum() == 29 and (actual.log_probs[~actual.label_mask] == 0).all()
    assert apart(actual.log_probs, expected.log_probs) <= NEAR
    assert apart(actual.entropy, expected.entropy) <= NEAR
    assert apart(actual.loss, expected.loss) <= NEAR
    near_gradients(gradients(packed), gradients(plain))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma3", "granite"])
def test_in_float64_hidden_states_are_equal_to_the_last_digits(family: str) -> None:
    """TRL's fused head computes in float32; Llama's, Gemma's and Granite's norms do, too."""
    ids, mask, _ = batch()
    within = 1e-9 if family in ("gpt2", "phi") else 1e-6
    plain, packed = build(family, torch.float64), build(family, torch.float64)
    shared(plain, "off"), shared(packed)
    weight = torch.linspace(0.5, 2.0, 32, dtype=torch.float64)
    found = {}
    for name, model in (("plain", plain), ("packed", packed)):
        states: list[torch.Tensor] = []
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        model(input_ids=ids, attention_mask=mask, position_ids=positions, hidden_of=LENGTH, sink=states.append)
        (states[0][mask[:, -LENGTH:].bool()].sin() @ weight).sum().backward()
        found[name] = states[0][mask[:, -LENGTH:].bool()], {n: p.grad for n, p in model.named_parameters()}
    assert apart(found["packed"][0], found["plain"][0]) <= within
    gradient = {n: g for n, g in found["plain"][1].items() if g is not None}
    near_gradients({n: found["packed"][1][n] for n in gradient}, gradient, within)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_prompts_padded_on_the_right(family: str) -> None:
    plain, packed = build(family), build(family)
    shared(packed)
    assert apart(score(packed, left=False).log_probs, score(plain, left=False).log_probs) <= NEAR
    near_gradients(gradients(packed, left=False), gradients(plain, left=False))


def test_checkpointing_and_lora() -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    found = []
    for mode in ("off", "on"):
        base = build("llama")
        torch.manual_seed(1)
        model: Any = get_peft_model(base, adapter)
        shared(base, mode)
        spy = Spy(base)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        found.append(gradients(model))
        assert spy.last_packed is (mode == "on")
        with model.disable_adapter(), torch.no_grad():
            found[-1]["without adapter"] = score(model).log_probs
    near_gradients(found[1], found[0])


def test_one_packed_row_holds_each_beginning_once() -> None:
    model = build("qwen3")
    shared(model)
    spy = Spy(model)
    score(model)
    ids, mask, _ = batch()
    distinct = {
        tuple(r[m.bool()][: n + 1].tolist()) for r, m in zip(ids, mask, strict=True) for n in range(int(m.sum()))
    }
    assert spy.shapes[-1] == (1, len(distinct)) and len(distinct) < 0.5 * mask.sum()


def test_only_positions_with_a_label_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import utils

    seen: list[int] = []
    theirs = utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            seen.append(len(hidden))
            return theirs.apply(hidden, *rest)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counting)
    model = build("qwen3")
    shared(model)
    score(model)
    assert seen == [29]


# -------------------------------------------------------------------------------------- teacher, decisions, experts


def targets(teacher: Any) -> TeacherTargets:
    ids, mask, _ = batch()
    omega = mask[:, -LENGTH:].bool() & torch.tensor([True, False, True, True, True, True, False]).unsqueeze(1)
    omega[3, 1] = False
    how = Divergence(0.5, 20, True, TEMPERATURE)
    return TeacherTargets(omega, completion_hidden(teacher, ids, mask, LENGTH)[omega], head_of(teacher), how)


def test_the_teachers_hidden_states_and_the_divergence() -> None:
    found = []
    for mode in ("off", "on"):
        student, teacher = build("llama"), build("llama", seed=1)
        shared(student, mode), shared(teacher, mode)
        spy, probed = Spy(teacher), []
        told = targets(teacher)
        assert spy.last_packed is (mode == "on")
        output = score(student, targets=told, gradient_probe=probed.append)
        (output.divergence.sum() + output.log_probs.sum()).backward()
        assert len(probed) == 1 and probed[0].shape == (29, 32)
        found.append((told.hidden, output.divergence, probed[0], {n: p.grad for n, p in student.named_parameters()}))
    for plain, packed in zip(found[0][:3], found[1][:3], strict=True):
        assert apart(packed, plain) <= NEAR
    near_gradients(found[1][3], found[0][3])


def test_decisions_are_scored_among_their_choices() -> None:
    ids = batch()[0]
    choices = torch.full((len(ids), LENGTH, 3), -1)
    choices[0, 2] = torch.tensor([int(ids[0, -LENGTH + 2]), 11, 12])
    choices[3, 0, :2] = torch.tensor([13, int(ids[3, -LENGTH])])
    found = []
    for mode in ("off", "on"):
        model = build("llama")
        shared(model, mode)
        with scored_among(model, choices):
            output = score(model)
        found.append(output)
        output.log_probs.sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert apart(found[2].log_probs, found[0].log_probs) <= NEAR and apart(found[2].entropy, found[0].entropy) <= NEAR
    near_gradients(found[3], found[1])


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_the_balance_of_experts_is_counted_over_each_rows_own_tokens(family: str) -> None:
    plain, packed = build(family), build(family)
    shared(packed)
    expected, actual = (score(model, output_router_logits=True) for model in (plain, packed))
    assert apart(actual.aux_loss, expected.aux_loss) <= NEAR
    for output in (expected, actual):
        output.aux_loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (packed, plain)]
    near_gradients(*grads)


def test_no_token_at_all() -> None:
    model = build("llama")
    shared(model)
    ids, mask, _ = batch()
    mask[:, -LENGTH:] = 0
    output = model(input_ids=ids, attention_mask=mask, labels=torch.full_like(ids, -100), fused_lm_head=True)
    output.log_probs.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.parameters()) > 5


def test_bf16_autocast_keeps_the_gradient_of_every_weight() -> None:
    """The first pass is tried out without gradient; what autocast has cast there must not serve the real one."""
    found = []
    for mode in ("off", "on"):
        model = build("llama")
        shared(model, mode)
        with torch.autocast("cpu", torch.bfloat16):
            output = score(model)
        output.log_probs.sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    near_gradients(found[1], found[0], within=0.1)


# ----------------------------------------------------------------------------------------------- when it is not done


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "shared_prefix" in record.getMessage()]


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    for name in ("transformers", "srpo"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return caplog


class SeesAll:
    """A planted bug: siblings see each other."""

    @staticmethod
    def sees(self: Any, window: int | None = None) -> torch.Tensor:
        width = self.ids.size(1)
        return torch.ones(width, width, dtype=torch.bool).tril().expand(self.ids.size(0), 1, -1, -1)


def test_a_wrong_mask_is_caught_by_the_first_pass(heard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srpo.prefix.tree.Layout.sees", SeesAll.sees)
    plain, packed = build("llama"), build("llama")
    shared(packed)
    spy = Spy(packed)
    for _ in range(3):
        assert (
            torch.equal(score(packed).log_probs, score(plain).log_probs)
            or apart(score(packed).log_probs, score(plain).log_probs) <= 1e-6
        )
    assert not spy.last_packed
    (words,) = warned(heard)
    assert "LlamaForCausalLM (family llama)" in words and "differ from plain ones by up to 1." in words


def test_a_model_that_ignores_positions_is_caught(heard: Any) -> None:
    packed = build("gpt2")
    packed.transformer.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    shared(packed)
    spy = Spy(packed)
    score(packed, position_ids=None)
    assert not spy.last_packed and "family gpt2" in warned(heard)[0]


def test_a_model_that_fails_on_a_packed_row_goes_on_without(heard: Any) -> None:
    plain, packed = build("llama"), build("llama")

    def fussy(_module: Any, _args: Any, kwargs: Any) -> None:
        if kwargs["attention_mask"].dim() == 4:
            raise ValueError("two dimensions, please")

    packed.model.register_forward_pre_hook(fussy, with_kwargs=True)
    shared(packed)
    assert apart(score(packed).log_probs, score(plain).log_probs) <= NEAR
    assert "fails on a packed row (ValueError: two dimensions, please)" in warned(heard)[0]


RECURRENT = {
    "mamba": ("MambaForCausalLM", {"state_size": 4}, "no position ids|recurrent"),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "recurrent or linear-attention",
    ),
    "bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 4}, "no position ids"),
    "falcon": ("FalconForCausalLM", {"alibi": True, "head_dim": None}, "ALiBi"),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 6},
        "local",
    ),
    "flash": ("LlamaForCausalLM", {"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
}


@pytest.mark.parametrize("family", RECURRENT)
def test_families_that_a_tree_would_be_wrong_for_are_recognised(family: str, heard: Any) -> None:
    name, settings, why = RECURRENT[family]
    kind = getattr(transformers, name)
    FAMILIES[family] = (name, {k: v for k, v in settings.items() if k != "attn_implementation"})
    try:
        plain, packed = build(family), build(family)
    finally:
        del FAMILIES[family]
    sharing = shared(packed)
    assert isinstance(packed, kind)
    if "attn_implementation" in settings:
        packed.config._attn_implementation = settings["attn_implementation"]
        sharing._about()
        packed.config._attn_implementation = "sdpa"
    takes = family not in ("mamba", "bloom")
    extra = {} if takes else {"position_ids": None}
    for _ in range(2):
        assert apart(score(packed, **extra).log_probs, score(plain, **extra).log_probs) <= NEAR
    (words,) = warned(heard)
    assert re.search(why, words) and name in words
