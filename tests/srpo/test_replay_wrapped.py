"""Routing replay under gradient checkpointing and PEFT: the gradient is that of plain replay, or there is an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_families import TOP_K, build, perturb, spy
from peft import LoraConfig, get_peft_model
from test_replay import SHAPE, gate, random_routes, tokens
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from srpo.replay.families import find_routers
from srpo.replay.replay import RoutingReplay

FIRST, SECOND = random_routes(seed=1), random_routes(seed=2)


def loss(model: Any, seed: int = 0) -> Tensor:
    ids = tokens(seed)
    scores = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return scores[:, :-1].gather(-1, ids[:, 1:, None]).sum()


def gradients(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def reference(batches: list[tuple[int, Tensor]]) -> Tensor:
    """Gradient of replay without checkpointing, one backward after each forward."""
    model = build("qwen3_moe").train()
    replay = RoutingReplay(model)
    for seed, routes in batches:
        with replay.replay(routes):
            loss(model, seed).backward()
    return gradients(model)


def checkpointed(family: str = "qwen3_moe", contexts: bool = False, **options: Any) -> tuple[Any, RoutingReplay]:
    model = build(family).train()
    replay = RoutingReplay(model)
    own = {"context_fn": replay.checkpoint_contexts} if contexts else {}
    model.gradient_checkpointing_enable({"use_reentrant": False} | own | options)
    return model, replay


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def in_thread(work: Callable[[], None]) -> None:
    """Autograd runs a device's backward in a worker thread; on a CPU we have to ask for it."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("thread", [False, True], ids=["same-thread", "other-thread"])
@pytest.mark.parametrize("contexts", [False, True], ids=["armed", "context_fn"])
def test_armed_through_backward_is_exact(contexts: bool, thread: bool, experts: str) -> None:
    model, replay = checkpointed(contexts=contexts)
    model.set_experts_implementation(experts)
    with spy(model) as seen, replay.replay(FIRST, measure=True):
        value = loss(model)
        before = replay.divergence()
        in_thread(value.backward) if thread else value.backward()
    assert len(seen) == 4  # two layers, forward and re-forward
    assert torch.equal(torch.stack(seen[:2], 1).view(*SHAPE, 2, TOP_K), FIRST.long())
    assert torch.equal(torch.stack(seen[:1:-1], 1), torch.stack(seen[:2], 1))  # backward goes from the last layer
    assert relative_error(gradients(model), reference([(0, FIRST)])) < 1e-6
    assert torch.equal(replay.divergence(), before)


def test_disarmed_before_backward_raises_without_context_fn_and_is_exact_with_it() -> None:
    model, replay = checkpointed()
    with replay.replay(FIRST):
        value = loss(model)
    with pytest.raises(CheckpointError):
        value.backward()
    for thread in (False, True):
        model, replay = checkpointed(contexts=True)
        with replay.replay(FIRST):
            value = loss(model)
        in_thread(value.backward) if thread else value.backward()
        assert relative_error(gradients(model), reference([(0, FIRST)])) < 1e-6


def test_two_forwards_and_one_backward_need_context_fn() -> None:
    errors = {}
    expected = reference([(0, FIRST), (1, SECOND)])
    for contexts in (False, True):
        model, replay = checkpointed(contexts=contexts)
        replay.arm(FIRST)
        first = loss(model, 0)
        replay.arm(SECOND)
        (first + loss(model, 1)).backward()
        replay.disarm()
        errors[contexts] = relative_error(gradients(model), expected)
    assert errors[False] > 0.1, "without context_fn the first forward is run again with the second's routes"
    assert errors[True] < 1e-6


def test_checkpoints_within_a_checkpoint_keep_their_routes() -> None:
    """Re-forwards nest: the outer block is run again, and its layers' own checkpoints after that."""
    model, replay = checkpointed(contexts=True)
    replay.arm(FIRST)
    value = checkpoint(loss, model, use_reentrant=False, context_fn=replay.checkpoint_contexts)
    replay.arm(SECOND)
    value.backward()
    assert relative_error(gradients(model), reference([(0, FIRST)])) < 1e-6


def test_a_native_forward_stays_native_in_its_re_forward() -> None:
    """A teacher or reference term in the same backward as a replayed one."""
    model, replay = checkpointed(contexts=True)
    native = loss(model, 1)
    replay.arm(FIRST)
    (native + loss(model, 0)).backward()
    plain = build("qwen3_moe").train()
    loss(plain, 1).backward()
    expected = gradients(plain) + reference([(0, FIRST)])
    assert relative_error(gradients(model), expected) < 1e-6


def test_recording_under_checkpointing_records_the_forward_once() -> None:
    model, replay = checkpointed()
    plain = RoutingReplay(build("qwen3_moe").train())
    with plain.record_once():
        plain._hooks.decoder(input_ids=tokens())
    with replay.record_once():
        loss(model).backward()
    assert torch.equal(replay.recorded(), plain.recorded())


def test_reentrant_checkpointing_is_refused() -> None:
    model, replay = checkpointed(use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant"):
        replay.arm(FIRST)
    replay._refuse_reentrant = lambda: None  # type: ignore[method-assign]
    with replay.replay(FIRST):  # what the refusal protects from: no error, and a wrong gradient
        value = loss(model)
    value.backward()
    assert relative_error(gradients(model), reference([(0, FIRST)])) > 0.05


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["gate.weight"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_replay_is_exact_with_peft(adapter: str, checkpointing: bool) -> None:
    model = get_peft_model(build("qwen3_moe"), LoraConfig(r=2, lora_dropout=0.0, **ADAPTERS[adapter])).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)  # B starts at 0, where A would get no gradient
    replay = RoutingReplay(model)
    assert replay.spec.layers == (0, 1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with torch.no_grad(), replay.record_once():
        model(input_ids=tokens())
    recorded = replay.recorded()
    perturb(model)
    with spy(model) as seen, replay.replay(recorded, measure=True):
        loss(model).backward()
    passes = torch.stack(seen[:2], 1).view(*SHAPE, 2, TOP_K)
    assert torch.equal(passes, recorded.long())
    assert (replay.divergence() > 0).any(), "native choices must have moved"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    if adapter in ("router", "modules_to_save"):
        trained = [name for name, p in model.named_parameters() if p.requires_grad and ".gate." in name]
        assert len(trained) == (4 if adapter == "router" else 2)


def test_switched_off_adapters_while_armed_raise_where_the_router_is_theirs() -> None:
    """A reference pass (adapter off) must not be replayed; with a router of its own it shows."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    model = get_peft_model(build("qwen3_moe"), config)
    replay = RoutingReplay(model)
    with replay.replay(FIRST), model.disable_adapter(), pytest.raises(RuntimeError, match="adapters are switched off"):
        model(input_ids=tokens())


def test_a_second_adapter_with_its_own_router_is_replayed_too() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    model = get_peft_model(build("qwen3_moe"), config)
    model.add_adapter("second", config)
    assert [len(modules) for modules in find_routers(model)[1]] == [2, 2]
    replay = RoutingReplay(model)
    for name in ("default", "second"):
        model.set_adapter(name)
        with spy(model) as seen, replay.replay(FIRST):
            model(input_ids=tokens())
        assert torch.equal(torch.stack(seen, 1).view(*SHAPE, 2, TOP_K), FIRST.long())


def test_hooks_that_came_before_peft_copied_the_router_raise() -> None:
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"]))
    with replay.replay(FIRST), pytest.raises(RuntimeError, match="PEFT copied a router"):
        wrapped(input_ids=tokens())
    with RoutingReplay(wrapped).replay(FIRST):
        loss(wrapped).backward()
    assert (gate(wrapped, 0).grad.abs() > 0).any()
