"""Which pass runs which experts, seen by an independent spy at the experts' input; what replay leaves alone."""

import pytest
import torch
from core_helpers import distance, equal, logged, weights
from peft import LoraConfig
from replay_cases import Spy, agreement, config, made, moe, reward

from srpo.replay import passes
from srpo.replay.settings import has_old_logprobs, replay_mode


def whole(passes):
    """All forwards of one kind as one table."""
    return {token: experts for table in passes for token, experts in table.items()}


def check(spy, mode, updates=4, per_rollout=2):
    """The pass table, rollout by rollout."""
    scores_per_rollout = len(spy.seen["score"]) // (updates // per_rollout)
    assert len(spy.seen["policy"]) == updates and scores_per_rollout > 0
    for rollout, sampled in enumerate(spy.seen["rollout"]):
        old = whole(spy.seen["score"][rollout * scores_per_rollout : (rollout + 1) * scores_per_rollout])
        target = sampled if mode == "R3" else old
        tokens, same = agreement(sampled, old)
        assert tokens > 100 and (mode != "R3" or same == tokens), "the old pass does not run the rollout's experts"
        for policy in spy.seen["policy"][rollout * per_rollout : (rollout + 1) * per_rollout]:
            tokens, same = agreement(target, policy)
            assert tokens > 50 and same == tokens, f"{mode}: {tokens - same} of {tokens} tokens ran other experts"


@pytest.mark.parametrize("mode", ["R2", "R3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policy_runs_the_recorded_experts_in_every_update(tmp_path, mode, checkpointing):
    run = made(tmp_path, routing_replay=mode, gradient_checkpointing=checkpointing)
    spy = Spy(run)
    run.train()
    check(spy, mode)
    # A re-forward shows no tokens, but its calls are the last policy forward's, layer by layer.
    assert bool(spy.layers["again"]) == checkpointing
    forward, again = spy.layers["policy"], spy.layers["again"]
    for i in range(0, len(again), 2):
        first = dict(forward[i : i + 2])
        assert all(torch.equal(first[place], ids) for place, ids in again[i : i + 2])
    assert not run.replay_passes.replay.armed


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_a_checkpoint_that_names_no_cache_is_replayed_too(tmp_path, where):
    """On a20621b each forward of such a rollout ran all columns again: 24 % of the choices were another token's."""
    network = moe()
    (network.config if where == "config" else network.generation_config).use_cache = False
    run = made(tmp_path, network, routing_replay_metrics_steps=1, max_steps=1)
    run.train()
    assert logged(run, "router/flip_rate") == [0.0] and logged(run, "router/fallback_fraction") == [0.0]
    assert logged(run, "sampling/outside_1.05") == [0.0]


def test_natively_the_experts_move_with_the_weights(tmp_path):
    """The control: without replay the second update of a rollout runs other experts than the rollout did."""
    run = made(tmp_path, routing_replay="off", seed=1)  # of 42 the first update has hardly a reward to learn from
    spy = Spy(run)
    run.train()
    tokens, same = agreement(spy.seen["rollout"][0], spy.seen["policy"][1])
    assert tokens > 50 and same < 0.9 * tokens
    assert run.replay_passes is None


def test_more_epochs_on_one_rollout_and_the_first_update_of_r2(tmp_path):
    run = made(tmp_path, routing_replay="R2", num_iterations=2, routing_replay_metrics_steps=1, loss_type="minirl")
    spy = Spy(run)
    run.train()
    flips = logged(run, "router/flip_rate")
    assert flips[0] == 0.0 and logged(run, "router/replay_bias")[0] == 0.0, "R2 does not alter the first update"
    assert max(flips[1:]) > 0.01 and max(logged(run, "router/replay_bias")[1:]) > 0
    assert len(spy.seen["rollout"]) == 1 and len(spy.seen["policy"]) == 4
    assert logged(run, "router/fallback_fraction") == [0.0] * 4


# ------------------------------------------------------------------------------------------------- native passes


def test_reference_evaluation_and_their_kind_are_native(tmp_path):
    """The reference is another model and never hooked; an evaluation inside of training runs natively."""
    moe().save_pretrained(tmp_path / "policy")
    run = made(tmp_path, str(tmp_path / "policy"), beta=0.1, model_init_kwargs={"dtype": "float32"})
    reference = Spy(run, run.ref_model)
    policy = Spy(run)
    run.train()
    check(policy, "R3")
    # The reference keeps the first weights, with which the first rollout was sampled, so it agrees with that rollout;
    # it must not agree with the second one, which the moved policy sampled.
    ref = whole(reference.seen["score"])
    tokens, same = agreement(policy.seen["rollout"][0], ref)
    assert tokens > 100 and same == tokens
    tokens, same = agreement(policy.seen["rollout"][1], ref)
    assert tokens > 100 and same < 0.9 * tokens
    run.model.eval()
    batch = run._generate_and_score_completions([dict(row) for row in run.train_dataset.select(range(4))])
    assert "expert_ids" not in batch and not run.replay_passes.replay.armed


LORA = {
    "attention": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "experts": LoraConfig(
        r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "router": LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
    "modules_to_save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["gate"]),
}


@pytest.mark.parametrize("kind", LORA)
def test_lora_replays_and_its_pass_without_the_adapter_is_native(tmp_path, kind):
    """The reference of a LoRA policy is the policy's own model with the adapter off: same modules, no replay."""
    run = made(tmp_path, peft_config=LORA[kind], beta=0.1, gradient_checkpointing=True, learning_rate=2.0)
    spy = Spy(run)
    before = weights(run.model)
    run.train()
    scores = spy.seen["score"]
    assert len(scores) == 8, "two rollouts, each with two chunks of the old policy and two of the reference"
    for rollout, sampled in enumerate(spy.seen["rollout"]):
        old, ref = whole(scores[4 * rollout : 4 * rollout + 2]), whole(scores[4 * rollout + 2 : 4 * rollout + 4])
        tokens, same = agreement(sampled, old)
        assert tokens > 100 and same == tokens
        if rollout or kind == "attention":  # where the adapter differs from nothing
            assert agreement(sampled, ref)[1] < tokens, "the reference ran the policy's experts"
        for policy in spy.seen["policy"][2 * rollout : 2 * rollout + 2]:
            tokens, same = agreement(sampled, policy)
            assert tokens > 30 and same == tokens
    after = weights(run.model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all("lora" in name or "modules_to_save" in name for name in moved)
    if kind in ("router", "modules_to_save"):
        assert any("gate." in name and "experts" not in name for name in moved), (
            "the router's own adapter stands still"
        )


@pytest.mark.parametrize("teacher", ["ema", "live"])
def test_the_student_of_srpo_replays_and_its_teacher_does_not(tmp_path, teacher):
    network = moe()
    network.generation_config.eos_token_id = [*range(145, 290)]  # half of the tokens end an answer: demonstrations
    run = made(
        tmp_path,
        network,
        objective="srpo",
        loss_type="dapo",
        teacher_model_kind=teacher,
        gradient_checkpointing=True,
        entropy_weight_beta=0.0,
    )
    spy = Spy(run)
    armed = []
    score = run.teacher.score

    def watched(*args, **kwargs):
        armed.append(run.replay_passes.replay.armed)
        return score(*args, **kwargs)

    run.teacher.score = watched
    run.train()
    assert armed and not any(armed)
    assert max(logged(run, "srpo/distilled_share")) > 0
    for rollout, sampled in enumerate(spy.seen["rollout"]):
        for policy in spy.seen["policy"][2 * rollout : 2 * rollout + 2]:
            tokens, same = agreement(sampled, policy)
            assert tokens > 30 and same == tokens


# ----------------------------------------------------------------------------------------------- what stays equal


def test_off_is_bitwise_trl_without_any_of_this(tmp_path):
    from core_helpers import TRLInOurOrder, dataset, our_samples, tokenizer
    from trl import GRPOConfig

    ours = made(tmp_path, routing_replay="off")
    ours.train()
    args = {name: getattr(ours.args, name) for name in ("per_device_train_batch_size", "steps_per_generation")}
    theirs = TRLInOurOrder(
        moe(),
        reward,
        GRPOConfig(
            **args, output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=4, max_completion_length=8,
            max_steps=4, report_to=[], optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0,
            save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, loss_type="dr_grpo",
            scale_rewards="none", epsilon_high=0.28,
        ),
        dataset(),
        processing_class=tokenizer(),
    )  # fmt: skip
    our_samples(theirs).train()
    assert equal(weights(ours.model), weights(theirs.model))
    assert distance(weights(ours.model), weights(moe())) > 1e-3


def test_where_routing_cannot_differ_replay_changes_no_bit(tmp_path):
    """One update per rollout at the weights that sampled, in fp32: native and recorded experts agree."""
    one = {"steps_per_generation": 1, "per_device_train_batch_size": 16, "max_steps": 2, "router_aux_loss_coef": 0.0}
    ends = []
    for mode in ("off", "R3"):
        run = made(tmp_path, routing_replay=mode, **one)
        run.train()
        ends.append(weights(run.model))
    assert distance(*ends) <= 1e-6 * distance(ends[0], weights(moe()))


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_the_cut_into_micro_batches_does_not_matter(tmp_path, mode):
    ends = []
    for rows, accumulation in ((8, 1), (4, 2), (2, 4)):
        run = made(
            tmp_path,
            routing_replay=mode,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=2 * accumulation,
        )
        run.train()
        ends.append(weights(run.model))
    moved = distance(ends[0], weights(moe()))
    assert moved > 1e-3
    assert distance(ends[0], ends[1]) <= 1e-4 * moved and distance(ends[0], ends[2]) <= 1e-4 * moved


@pytest.mark.parametrize("mode", ["R2", "R3"])
def test_resuming_inside_a_rollout_is_bitwise(tmp_path, mode):
    """Eight steps, against three, a checkpoint with the rest of the rollout and its routes, and five."""
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        run = made(
            tmp_path, routing_replay=mode, max_steps=8, optim="adamw_torch", learning_rate=1e-2,
            save_strategy="steps", save_steps=3,
        )  # fmt: skip
        run.train(resume_from_checkpoint=checkpoint)
        ends.append(weights(run.model))
    assert (tmp_path / "checkpoint-3" / "rollouts_0.safetensors").exists()
    assert equal(*ends)


def test_masked_truncated_completions_keep_their_prompt(tmp_path):
    run = made(tmp_path, mask_truncated_completions=True)
    spy = Spy(run)
    run.train()
    tokens, same = agreement(spy.seen["rollout"][0], whole(spy.seen["policy"][:2]))
    assert tokens > 30 and same == tokens


# ------------------------------------------------------------------------------------------- planted misalignment


def test_routes_of_other_tokens_raise_the_alarm(tmp_path, monkeypatch):
    """Every sequence's routes one token late: what an engine that drops a row would deliver."""
    said = []
    run = made(tmp_path, routing_replay_metrics_steps=1)
    run.replay_passes.alarms._once._warn = run.replay_passes.alarms._trend._warn = said.append
    lay_out = passes.laid_out

    def late(step, mask):
        step.expert_rows = [torch.cat([row[1:-1], row[:1], row[-1:]]) for row in step.expert_rows]
        return lay_out(step, mask)

    monkeypatch.setattr(passes, "laid_out", late)
    audit, flips = passes.audited, []

    def watched(score, replay, inputs, *rest):
        for row in inputs[passes.EXPERT_IDS].sort(-1).values:
            moved = row[(row >= 0).all(-1).all(-1)]
            flips.append((moved != moved.roll(1, 0)).any(-1).double())  # natively each token has its own again
        return audit(score, replay, inputs, *rest)

    monkeypatch.setattr(passes, "audited", watched)
    run.train()
    assert any("misaligned" in text for text in said), said
    share = torch.cat(flips[:8]).mean().item()  # but for the layers after the first, which read other states now
    assert logged(run, "router/flip_rate")[0] == pytest.approx(share, abs=0.05) and share > 0.7
    assert logged(run, "router/kl_k3_replay")[0] > 100 * logged(run, "router/kl_k3_native")[0]


def test_aligned_routes_do_not(tmp_path):
    said = []
    run = made(tmp_path, routing_replay_metrics_steps=1, learning_rate=1e-3)
    run.replay_passes.alarms._once._warn = run.replay_passes.alarms._trend._warn = said.append
    run.train()
    assert said == [] and logged(run, "router/flip_rate")[0] < 0.01


def test_a_rollout_function_must_return_routes(tmp_path):
    from core_helpers import scripted

    with pytest.raises(ValueError, match=r"R3, but the rollout function returned no 'expert_ids'"):
        made(tmp_path, rollout_func=scripted).train()


def test_a_rollout_function_may_return_an_engine_s_routes(tmp_path):
    """Routes as lists, as an engine's adapter gives them; the policy runs exactly these."""
    from core_helpers import scripted

    def engine(prompts, run):
        answer = scripted(prompts, run)
        lengths = [len(p) + len(c) for p, c in zip(answer["prompt_ids"], answer["completion_ids"], strict=True)]
        answer["expert_ids"] = [
            [[[(t + layer) % 8, (t + layer + 3) % 8] for layer in range(2)] for t in range(n - 1)] + [[[-1, -1]] * 2]
            for n in lengths
        ]
        return answer

    run = made(tmp_path, rollout_func=engine)
    spy = Spy(run)
    run.train()
    for table in spy.seen["policy"]:
        shown = [experts for token, experts in table.items() if len(token) == 5]
        assert set(shown) == {(frozenset({4, 7}), frozenset({5, 0}))}


# ------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "R2"),  # two updates per rollout
        ({"steps_per_generation": 4}, "R3"),
        ({"num_iterations": 3}, "R3"),
        ({"steps_per_generation": 1, "loss_type": "minirl"}, "off"),  # one, with importance correction
        ({"steps_per_generation": 1}, "R3"),  # one, without
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2, "loss_type": "minirl"}, "off"),
        ({"steps_per_generation": 1, "routing_replay": "R2"}, "off"),  # nothing to record
    ],
)
def test_auto_follows_the_paper(tmp_path, changes, mode):
    args = config(tmp_path, **{"routing_replay": "auto", **changes})
    assert replay_mode(args) == mode
    assert has_old_logprobs(args) is (
        args.steps_per_generation * args.num_iterations > args.gradient_accumulation_steps
    )


def test_a_dense_policy(tmp_path, caplog):
    from core_helpers import model

    with pytest.raises(ValueError, match=r"no MoE router"):
        made(tmp_path, model())
    run = made(tmp_path, model(), routing_replay="auto")
    assert run.replay_passes is None
    run.train()


def test_the_auxiliary_loss_is_off_with_replay_unless_asked_for(tmp_path):
    assert made(tmp_path).aux_loss_enabled is False
    assert made(tmp_path, routing_replay="off").aux_loss_enabled is True  # TRL's default: the model's coefficient
    assert made(tmp_path, router_aux_loss_coef=0.01).aux_loss_enabled is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing_replay": "R4"}, r"routing_replay='R4' is not one of off, R2, R3, auto"),
        ({"routing_replay_metrics_steps": -1}, r"routing_replay_metrics_steps=-1"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            r"reentrant checkpointing .* \{use_reentrant: false\}",
        ),
        ({"use_vllm": True, "vllm_mode": "server"}, r"vllm_mode: colocate or routing_replay: R2"),
        ({"use_transformers_continuous_batching": True}, r"continuous batching"),
    ],
)
def test_settings_that_contradict(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_a_noisy_router_is_refused(tmp_path):
    network = moe()
    network.config.router_jitter_noise = 0.1
    with pytest.raises(ValueError, match=r"router_jitter_noise is 0.1"):
        made(tmp_path, network)
