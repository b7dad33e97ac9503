"""Routing replay on tiny real models: weights and gradients, alignment, who is left alone, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from moe_families import EXPERTS, TOP_K, VOCABULARY, build, experts_of, perturb, right_aligned, sampled
from torch import Tensor, nn

from srpo.replay.expert_table import flip_statistics, pad_routes
from srpo.replay.families import find_routers
from srpo.replay.replay import RoutingReplay

BATCH, WIDTH = 2, 6
SHAPE = (BATCH, WIDTH)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(seed))


def random_routes(layers: int = 2, experts: int = EXPERTS, k: int = TOP_K, seed: int = 0) -> Tensor:
    scores = torch.rand(*SHAPE, layers, experts, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(-1)[..., :k].to(torch.int16)


def gate(model: Any, layer: int) -> nn.Parameter:
    return max(find_routers(model)[1][layer][0].parameters(), key=Tensor.numel)


def router_outputs(model: Any, replay: RoutingReplay, routes: Tensor) -> list[Any]:
    """What each router returns while `routes` are replayed; (logits [N, E], weights [N, k], ids [N, k]) as a rule."""
    seen: list[Any] = []
    handles = [ms[0].register_forward_hook(lambda m, a, out: seen.append(out)) for ms in find_routers(model)[1]]
    with torch.no_grad(), replay.replay(routes):
        model(input_ids=tokens())
    for handle in handles:
        handle.remove()
    return seen


def tiny(kind: str, **settings: Any) -> Any:
    model = getattr(transformers, f"{kind}ForCausalLM")
    shared = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return model(model.config_class(**shared | heads | settings)).eval()


# What is computed


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "qwen3_5_moe"])
def test_renormalising_families_compute_the_r3_equation(family: str) -> None:
    """g_i = I_i exp(s_i) / sum_j I_j exp(s_j): a softmax over the replayed experts' logits."""
    model, routes = build(family), random_routes()
    for layer, (logits, weights, ids) in enumerate(router_outputs(model, RoutingReplay(model), routes)):
        assert torch.equal(ids, routes[:, :, layer].reshape(-1, TOP_K).long())
        expected = logits.gather(1, ids).softmax(-1)
        torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "jamba"])
def test_families_without_renormalisation_keep_the_mass_of_the_full_softmax(family: str) -> None:
    model, routes = build(family), random_routes()
    for logits, weights, ids in router_outputs(model, RoutingReplay(model), routes):
        torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids), atol=1e-6, rtol=0)
        wrong = (logits.gather(1, ids).softmax(-1) - weights).abs().max()  # the R3 equation, where it does not hold
        assert wrong > 0.1 and weights.sum(-1).max() < 0.999


def test_deepseek_v3_selects_with_a_bias_and_groups_that_replay_ignores() -> None:
    model, routes = build("deepseek_v3"), random_routes()
    for logits, weights, ids in router_outputs(model, RoutingReplay(model), routes):
        chosen = logits.sigmoid().gather(1, ids)  # without e_score_correction_bias
        torch.testing.assert_close(weights, 1.5 * chosen / chosen.sum(-1, keepdim=True), atol=1e-6, rtol=0)


def test_deepseek_v2_has_no_dead_slots_outside_of_todays_groups() -> None:
    model, routes = build("deepseek_v2"), random_routes()
    outside = 0
    for logits, weights, ids in router_outputs(model, RoutingReplay(model), routes):
        scores = logits.softmax(-1)
        torch.testing.assert_close(weights, 1.5 * scores.gather(1, ids), atol=1e-6, rtol=0)
        groups = scores.view(-1, 4, 2).max(-1).values.topk(2).indices
        outside += int((ids[:, :, None] // 2 != groups[:, None, :]).all(-1).sum())
        assert (weights > 0).all()
    assert outside > 5  # natively these slots would have had weight 0


def test_llama4_whose_experts_get_scores_and_no_ids() -> None:
    """Not in the table of families, as the spy sees no ids: the scores above 0 are those of the replayed experts."""
    settings = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size_mlp": 48}
    model = tiny("Llama4", head_dim=8, interleave_moe_layer_step=1, **settings)
    routes = random_routes()
    for layer, (scores, logits) in enumerate(router_outputs(model, RoutingReplay(model), routes)):
        ids = routes[:, :, layer].reshape(-1, TOP_K).long()
        expected = torch.zeros_like(scores).scatter(1, ids, logits.gather(1, ids).sigmoid())
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "deepseek_v2", "gpt_oss"])
def test_gate_gradient_agrees_with_finite_differences(family: str) -> None:
    """Central differences in float64. Routers compute their softmax in float32, which bounds the agreement."""
    model = build(family).double()
    model.set_experts_implementation("eager")
    replay, ids, routes = RoutingReplay(model), tokens(), random_routes()

    def loss() -> Tensor:
        with replay.replay(routes):
            return model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum()

    loss().backward()
    for layer in range(2):
        weight = gate(model, layer)
        assert weight.grad is not None
        largest = weight.grad.abs().max()
        places = weight.grad.abs().flatten().argsort(descending=True)[[0, 1, 7, 40]]
        for place in places.tolist():
            numbers = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    weight.view(-1)[place] += step
                    numbers.append(loss())
                    weight.view(-1)[place] -= step
            numerical = (numbers[0] - numbers[1]) / 2e-3
            assert abs(numerical - weight.grad.view(-1)[place]) < 2e-3 * largest


def test_experts_that_are_never_replayed_get_gate_gradient_only_through_a_full_softmax() -> None:
    for family, sees_all in (("qwen3_moe", False), ("olmoe", True)):
        model, routes = build(family), random_routes(experts=4)  # experts 4..7 never occur
        with RoutingReplay(model).replay(routes):
            model(input_ids=tokens()).logits.log_softmax(-1)[..., 5].sum().backward()
        gradient = gate(model, 1).grad
        assert gradient is not None and (gradient[:4].abs().sum(-1) > 0).all()
        unseen = gradient[4:].abs().max() / gradient.abs().max()  # float32 rounds what cancels to some 1e-8
        assert (unseen > 1e-4) if sees_all else (unseen < 1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "deepseek_v3", "longcat_flash", "jamba"])
def test_rows_of_minus_one_are_routed_natively(family: str) -> None:
    model = build(family)
    replay = RoutingReplay(model)
    with torch.no_grad():
        native = model(input_ids=tokens()).logits
        with replay.replay(torch.full((*SHAPE, 2, TOP_K), -1)):
            holes = model(input_ids=tokens()).logits
        assert torch.equal(holes, native)
        some = random_routes()
        some[:, 3:] = -1  # attention is causal: the first three columns follow the routes, all later ones feel them
        with replay.replay(some, measure=True):
            mixed = model(input_ids=tokens()).logits
    assert not torch.allclose(mixed[:, :3], native[:, :3])
    lost = replay.divergence()
    assert (lost[:, 3:] == -1).all() and (lost[:, :3] >= 0).all()


def test_divergence_counts_native_experts_that_the_routes_lack() -> None:
    model, routes = build("qwen3_moe"), random_routes()
    replay, natives = RoutingReplay(model), []
    for router, *_ in find_routers(model)[1]:
        router.register_forward_hook(lambda m, a, out: natives.append(out[0].topk(TOP_K).indices))
    with torch.no_grad(), replay.replay(routes, measure=True):
        model(input_ids=tokens())
    lost = replay.divergence().reshape(-1, 2)
    for layer, native in enumerate(natives):
        replayed = routes[:, :, layer].reshape(-1, TOP_K).tolist()
        expected = [len(set(a) - set(b)) for a, b in zip(native.tolist(), replayed, strict=True)]
        assert lost[:, layer].tolist() == expected and {0, 1, 2} >= set(expected) != {2}


def test_aux_loss_inputs_are_the_live_logits() -> None:
    model = build("qwen3_moe", output_router_logits=True)
    replay = RoutingReplay(model)
    with torch.no_grad():
        native = model(input_ids=tokens()).router_logits
        with replay.replay(random_routes()):
            replayed = model(input_ids=tokens()).router_logits
    assert torch.equal(native[0], replayed[0])  # the first layer's input does not depend on routes


def test_off_and_idle_hooks_are_bitwise_identical() -> None:
    results = []
    for installed in (False, True):
        model = build("qwen3_moe").train()
        if installed:
            replay = RoutingReplay(model)
            with replay.replay(random_routes()), torch.no_grad():
                model(input_ids=tokens())
        logits = model(input_ids=tokens()).logits
        logits.log_softmax(-1)[..., 5].sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_recording_does_not_change_results_and_remove_takes_the_hooks_off() -> None:
    model = build("qwen3_moe")
    native = model(input_ids=tokens()).logits
    replay = RoutingReplay(model)
    with replay.record_once():
        assert torch.equal(model(input_ids=tokens()).logits, native)
    assert replay.recorded().dtype == torch.int16 and replay.recorded().shape == (*SHAPE, 2, TOP_K)
    replay.remove()
    assert all(not (m._forward_hooks or m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_r2_leaves_the_first_mini_batch_unaltered(family: str) -> None:
    """Routes that this very forward recorded: no flip, and the results are bitwise the native ones."""
    model = build(family).train()
    replay = RoutingReplay(model)
    with torch.no_grad(), replay.record_once():
        native = model(input_ids=tokens()).logits
    with replay.replay(replay.recorded(), measure=True):
        assert torch.equal(model(input_ids=tokens()).logits, native)
    assert (replay.divergence() == 0).all()


# Alignment


PROMPTS = [tokens(1)[0, 2:].tolist(), tokens(1)[1].tolist()]


def logprobs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of each real token but the first of a sequence, one after the other."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    scores = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
    taken = scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return taken[(mask[:, 1:] * mask[:, :-1]).bool()]


def test_routes_of_the_sampler_are_those_of_a_forward() -> None:
    """Sampled step by step with a cache, siblings behind one prompt, rows that end early; and in one forward without
    padding: in float32 the same choices."""
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    ids, routes, *_ = sampled(model, replay, PROMPTS * 4, 40, ends=(2,))
    assert len({len(row) for row in routes}) > 2, "sequences of different lengths, or this shows nothing"
    for own, row in zip(ids, routes, strict=True):
        assert len(row) == len(own) and (row[-1] == -1).all()
        with torch.no_grad(), replay.record_once():
            model(input_ids=own[None])
        assert torch.equal(replay.recorded()[0, :-1], row[:-1])


def test_replay_does_not_depend_on_the_padding() -> None:
    model = build("deepseek_v3")
    replay = RoutingReplay(model)
    sequences, routes, *_ = sampled(model, replay, PROMPTS, 6)
    ids, mask = right_aligned(sequences)
    perturb(model)
    results = []
    for left, right in ((0, 0), (3, 0), (0, 4), (2, 1)):
        wide = nn.functional.pad(ids, (left, right))
        wide_mask = nn.functional.pad(mask, (left, right))
        table = pad_routes(routes, wide_mask)
        assert all(torch.equal(a[m.bool()], b) for a, m, b in zip(table, wide_mask, routes, strict=True))
        with torch.no_grad(), replay.replay(table):
            results.append(logprobs(model, wide, wide_mask))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=2e-6, rtol=0)


def test_routes_that_are_off_by_one_are_seen_at_once() -> None:
    """k3 between sampler and trainer, and the flip rate, both jump by orders of magnitude."""
    model = build("qwen3_moe")
    replay = RoutingReplay(model)
    sequences, routes, *_ = sampled(model, replay, PROMPTS, 20)
    ids, mask = right_aligned(sequences)
    with torch.no_grad():
        sampler = logprobs(model, ids, mask)
        seen = {}
        for name, rows in (("right", routes), ("shifted", [row.roll(1, dims=0) for row in routes])):
            with replay.replay(pad_routes(rows, mask), measure=True):
                ratio = logprobs(model, ids, mask) - sampler
            k3 = (ratio.exp() - ratio - 1).mean().item()
            seen[name] = (k3, flip_statistics(replay.divergence(), TOP_K, mask)["flip_rate"].item())
    assert seen["right"][0] < 1e-9 and seen["right"][1] == 0
    assert seen["shifted"][0] > 1e-2 and seen["shifted"][1] > 0.5


def test_ids_beyond_one_byte_survive() -> None:
    for experts in (256, 300):
        model = build("qwen3_moe", num_experts=experts)
        replay = RoutingReplay(model)
        routes = random_routes(experts=experts)
        routes[0, 0, 0] = torch.tensor([experts - 1, 0])
        ids = [out[2] for out in router_outputs(model, replay, routes)]
        assert torch.equal(torch.stack(ids, 1).view(*SHAPE, 2, TOP_K), routes.long())
        with torch.no_grad(), replay.record_once():
            model(input_ids=tokens())
        assert replay.recorded().max() > 200  # natively some of 300 experts lie there too
        with pytest.raises(ValueError, match="8 bits are too few"):
            replay.arm(routes.to(torch.uint8))


@pytest.mark.slow
def test_compiled_models_follow_the_mode() -> None:
    model = build("qwen3_moe")
    model.set_experts_implementation("eager")
    replay, routes = RoutingReplay(model), random_routes()
    with torch.no_grad():
        native = model(input_ids=tokens()).logits
        with replay.replay(routes):
            replayed = model(input_ids=tokens()).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(input_ids=tokens()).logits, native)
        with replay.replay(routes):
            torch.testing.assert_close(compiled(input_ids=tokens()).logits, replayed)
        torch.testing.assert_close(compiled(input_ids=tokens()).logits, native)
    assert len(experts_of(model)) == 2
