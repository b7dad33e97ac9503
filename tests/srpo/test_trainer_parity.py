"""With nothing distilled SRPO is TRL's GRPO, bit for bit: generation, loss, gradients, weights after several steps.

Sums have equal bits in one order only, so TRL's trainer gets its rows in our micro-batches here (`TRLInOurOrder`).
"""

import pytest
import torch
import trl
from core_helpers import (
    TRLInOurOrder,
    config,
    dataset,
    distance,
    equal,
    logged,
    model,
    our_samples,
    tokenizer,
    trainer,
    weights,
)
from peft import LoraConfig
from transformers import PrinterCallback, Qwen3MoeConfig, Qwen3MoeForCausalLM

from srpo.trainer.named import GRPOTrainer
from srpo.trainer.trainer import SRPOTrainer

SHARED = {
    "use_cpu": True,
    "bf16": False,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 4,
    "logging_steps": 1,
    "report_to": [],
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "temperature": 0.9,
    "max_grad_norm": 0.3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}
SPLITS = {
    "1x8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "4x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "two_steps_per_batch": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "delta": 1.5,
    },
    "reference_penalty": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "beta": 0.1,
        "optim": "sgd",  # Adam would turn a last bit of a tiny gradient into a step
        "learning_rate": 0.3,
        "model_init_kwargs": {"dtype": "float32"},
    },
}


def none_correct(completion_ids, **_):
    """Below the threshold of 0.5, so nobody is a demonstration, but different within a group: there is a gradient."""
    return [0.1 * (sum(ids) % 5) for ids in completion_ids]


def policy(folder):
    """By its path, as a reference policy needs it."""
    model().save_pretrained(folder / "policy")
    return str(folder / "policy")


def trl_run(folder, split):
    args = trl.GRPOConfig(
        output_dir=str(folder), loss_type="dapo", scale_rewards="none", epsilon_high=0.28, **{**SHARED, **split}
    )
    made = TRLInOurOrder(policy(folder), none_correct, args, dataset(), processing_class=tokenizer())
    made.remove_callback(PrinterCallback)
    our_samples(made).train()
    return made


def our_run(folder, split, objective, **kwargs):
    args = config(folder, **{"objective": objective, **SHARED, **split})
    made = trainer(args, policy(folder), rewards=none_correct, rollout_func=None, **kwargs)
    made.train()
    return made


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_distilled_is_trl_dapo_bit_for_bit(tmp_path, split):
    reference = trl_run(tmp_path, SPLITS[split])
    start, end = weights(model()), weights(reference.model)
    assert distance(start, end) > 1e-3, "the reference did not learn: the comparison would be empty"
    for objective in ("grpo", "srpo"):
        ours = our_run(tmp_path, SPLITS[split], objective)
        if objective == "srpo":
            assert logged(ours, "srpo/distilled_share") == [0.0] * len(logged(ours, "srpo/distilled_share"))
        # The penalty's gradient is summed in another order than TRL's; everything else has equal bits.
        bits = objective == "grpo" or "beta" not in SPLITS[split]
        moved = distance(weights(ours.model), end)
        assert moved == 0 if bits else moved <= 1e-5 * distance(start, end), objective
        # A mean over tokens is TRL's of each micro-batch, and ours of a step.
        alike = objective == "grpo" or SPLITS[split]["gradient_accumulation_steps"] == 1
        for name in ("loss", "grad_norm", "reward", *["entropy"] * alike):
            expected = logged(reference, name)
            assert logged(ours, name) == (expected if bits else pytest.approx(expected, rel=1e-5)), (objective, name)
    assert ("beta" in SPLITS[split]) is (ours.beta > 0)


def test_nothing_distilled_with_lora_is_grpo_bit_for_bit(tmp_path):
    # Making the teacher's adapter must not draw from the random numbers that sample completions.
    lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    split = SPLITS["4x2"]
    runs = {o: our_run(tmp_path, split, o, peft_config=LoraConfig(**lora)) for o in ("grpo", "srpo")}
    names = {name for name, p in runs["grpo"].model.named_parameters() if p.requires_grad}
    trained = {o: {n: p for n, p in weights(made.model).items() if n in names} for o, made in runs.items()}
    assert names and equal(trained["grpo"], trained["srpo"])
    assert logged(runs["grpo"], "loss") == logged(runs["srpo"], "loss")


def test_the_grpo_trainer_takes_other_loss_types(tmp_path):
    split = {**SPLITS["4x2"], "loss_type": "cispo", "epsilon_high": 5.0}
    args = trl.GRPOConfig(output_dir=str(tmp_path), scale_rewards="none", **SHARED, **split)
    reference = TRLInOurOrder(model(), none_correct, args, dataset(), processing_class=tokenizer())
    our_samples(reference).train()
    ours = our_run(tmp_path, split, "grpo", cls=GRPOTrainer)
    assert equal(weights(ours.model), weights(reference.model))


def test_sdpo_with_nothing_distilled_does_not_move(tmp_path):
    # Every rollout truncated (no room for an end token): nobody may be a demonstration.
    args = config(tmp_path, objective="sdpo", max_completion_length=1, max_steps=2)
    made = trainer(
        args,
        rollout_func=lambda prompts, t: {
            "prompt_ids": t._tokenize_prompts(prompts)[0],
            "completion_ids": [[70 + i % 4] for i in range(len(prompts))],
            "logprobs": None,
        },
        rewards=lambda completions, **_: [1.0] * len(completions),
    )
    made.train()
    assert equal(weights(made.model), weights(model()))
    assert logged(made, "grad_norm") == [0.0, 0.0]
    assert isinstance(made, SRPOTrainer) and torch.isfinite(torch.tensor(logged(made, "loss"))).all()


def mixture():
    """Two experts of four per token, and a load-balancing loss."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer())}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, **special, initializer_range=0.2))


def test_nothing_distilled_in_a_mixture_of_experts(tmp_path):
    ends, losses = [], []
    for objective in ("grpo", "srpo"):
        args = config(tmp_path, objective=objective, **SHARED, **SPLITS["4x2"])
        made = trainer(args, mixture(), rewards=none_correct, rollout_func=None)
        made.train()
        assert all(value > 0 for value in logged(made, "aux_loss")) and made.aux_loss_enabled
        ends.append(weights(made.model))
        losses.append(logged(made, "loss"))
    assert equal(*ends) and losses[0] == losses[1]


def test_a_mixture_of_experts_is_distilled(tmp_path):
    made = trainer(config(tmp_path, max_steps=2, distillation_topk=50), mixture())
    made.train()
    assert all(0 < share < 1 for share in logged(made, "srpo/distilled_share"))
    parts = (logged(made, name) for name in ("loss/grpo", "loss/sdpo", "aux_loss"))
    expected = [grpo + sdpo + 0.1 * aux for grpo, sdpo, aux in zip(*parts, strict=True)]
    assert logged(made, "loss") == pytest.approx(expected, rel=1e-5)
