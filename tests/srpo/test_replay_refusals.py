"""Who routing replay leaves alone, and what it refuses instead of computing something wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moe_families import EXPERTS, TOP_K, build, missing
from test_replay import SHAPE, random_routes, tiny, tokens
from torch import Tensor
from torch.overrides import _len_torch_function_stack

from srpo.replay.replay import RoutingReplay


def test_copies_and_other_models_do_not_react() -> None:
    model, other = build("qwen3_moe"), build("qwen3_moe", seed=5)
    replay, other_replay = RoutingReplay(model), RoutingReplay(other)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        native, others = model(input_ids=tokens()).logits, other(input_ids=tokens()).logits
        with replay.replay(random_routes(seed=1)):
            assert torch.equal(teacher(input_ids=tokens()).logits, native)
            assert torch.equal(other(input_ids=tokens()).logits, others)
            teacher(input_ids=tokens()[:, :3])  # the policy would refuse this width
            alone = model(input_ids=tokens()).logits
            with other_replay.replay(random_routes(seed=2)):
                together = other(input_ids=tokens()).logits
                assert torch.equal(model(input_ids=tokens()).logits, alone)
            assert not torch.equal(together, others) and not torch.equal(alone, native)
        with replay.record_once():
            teacher(input_ids=tokens())
        with pytest.raises(RuntimeError, match="nothing recorded"):
            replay.recorded()
        own = RoutingReplay(teacher)  # a copy can have its own
        with own.replay(random_routes(seed=1)):
            assert torch.equal(teacher(input_ids=tokens()).logits, alone)
            assert torch.equal(model(input_ids=tokens()).logits, native)


# What is refused


def test_a_family_without_a_topk_raises_at_its_first_use() -> None:
    model = tiny("Phimoe", num_local_experts=EXPERTS, num_experts_per_tok=TOP_K)
    replay = RoutingReplay(model)
    model(input_ids=tokens())  # off: untouched
    with replay.record_once(), pytest.raises(RuntimeError, match=r"PhimoeTopKRouter .* 0 times, expected once"):
        model(input_ids=tokens())
    with replay.replay(random_routes()), pytest.raises(RuntimeError, match="does not support this family"):
        model(input_ids=tokens())
    assert _len_torch_function_stack() == 0
    model(input_ids=tokens())


def test_models_without_a_usable_router_raise_when_installed() -> None:
    with pytest.raises(ValueError, match="no MoE router"):
        RoutingReplay(tiny("Qwen3", head_dim=8))
    experts = {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4}
    dbrx = tiny("Dbrx", d_model=32, n_heads=4, n_layers=2, attn_config=attention, ffn_config=experts)
    with pytest.raises(ValueError, match="unsupported family"):
        RoutingReplay(dbrx)
    with pytest.raises(ValueError, match="no router of its own to hook, only DogeCDMoE, which chooses"):
        RoutingReplay(tiny("Doge", is_moe=True, num_experts=16, num_experts_per_tok=TOP_K))


@pytest.mark.parametrize(
    ("family", "settings", "router"),
    [
        ("flint", {"num_hidden_layers": 2}, "FlintTopKRouter"),
        ("deepseek_v4", {"mlp_layer_types": ["hash_moe"] * 3}, "DeepseekV4TopKRouter"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "Qwen3MoeTopKRouter"),
    ],
)
def test_a_moe_model_whose_layers_choose_nothing_says_so(family: str, settings: dict[str, Any], router: str) -> None:
    if why := missing(family):
        pytest.skip(why)
    with pytest.raises(ValueError, match=f"none of its layers has a {router}, which its family routes with"):
        RoutingReplay(build(family, **settings))


def test_a_kernel_that_bypasses_a_router_raises() -> None:
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    model.model.layers[1].mlp.forward = lambda hidden: hidden  # as a fused MoE block does
    for context in (replay.record_once(), replay.replay(random_routes())):
        with context, pytest.raises(RuntimeError, match=r"routers of layers \[1\] did not run"):
            model(input_ids=tokens())


def test_continuous_batching_raises() -> None:
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    with replay.record_once(), pytest.raises(RuntimeError, match="continuous batching"):
        model(input_ids=tokens(), write_index=[torch.arange(4)])  # what its runner passes to every forward
    with pytest.raises(RuntimeError, match="nothing recorded"):
        replay.recorded()


def test_wrong_use_raises_and_leaves_nothing_behind() -> None:
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    native = model(input_ids=tokens()).logits
    with replay.replay(random_routes()):
        with pytest.raises(ValueError, match=r"routes of \(2, 6\) are armed for a forward of \(2, 5\)"):
            model(input_ids=tokens()[:, :5])
        with pytest.raises(RuntimeError, match="cannot record while a replay is armed"), replay.record_once():
            pass
    with replay.record_once(), pytest.raises(RuntimeError, match="cannot replay while recording"):
        replay.arm(random_routes())
    with pytest.raises(RuntimeError, match="no divergence"):
        replay.divergence()
    for routes, message in (
        (torch.zeros(*SHAPE, 2, TOP_K, dtype=torch.int16), "names an expert twice"),
        (random_routes(experts=9, seed=4), "outside 0..7"),
        (random_routes(layers=3), "2 routers that choose 2"),
        (random_routes(k=3), "2 routers that choose 2"),
    ):
        with pytest.raises(ValueError, match=message):
            replay.arm(routes)
    assert not replay.armed and _len_torch_function_stack() == 0
    assert torch.equal(model(input_ids=tokens()).logits, native)


def test_an_error_inside_of_a_router_leaves_no_mode_behind() -> None:
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    router = model.model.layers[0].mlp.gate
    forward = router.forward

    def fails(hidden: Tensor) -> Tensor:
        forward(hidden)
        raise KeyError("planted")

    router.forward = fails
    with replay.replay(random_routes()), pytest.raises(KeyError, match="planted"):
        model(input_ids=tokens())
    assert _len_torch_function_stack() == 0
    del router.forward
    with replay.replay(random_routes()):
        model(input_ids=tokens())
