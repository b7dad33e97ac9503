"""Weights that train are fp32 however they are given: an update of 5e-6 arrives, instead of being rounded away.

Plain Adam moves a weight by about the learning rate in its first steps, whatever the gradient, so nearly every weight
must differ after a few. In bf16 fewer than one in ten do.
"""

import types

import pytest
import torch
from core_helpers import config, model, tokenizer, trainer, weights
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from srpo.sft import sft
from srpo.trainer.precision import check_precision, loading_options, train_in_fp32

RATE = 5e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy whose weights are bf16 numbers, so that no way of loading it rounds them."""
    path = tmp_path_factory.mktemp("policy")
    model().bfloat16().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def moved(start, network):
    """Share of the weights that a run changed, and the largest change."""
    now = weights(network)
    everything = torch.cat([(now[name].float() - value.float()).abs().flatten() for name, value in start.items()])
    return (everything > 0).float().mean().item(), everything.max().item()


GIVEN = {
    "by_name": {},
    "by_name_in_bf16": {"model_init_kwargs": {"dtype": "bfloat16"}},
    "bf16_instance": {},
    "fp16_instance_without_autocast": {"bf16": False},
}

DTYPES = {"bf16_instance": torch.bfloat16, "fp16_instance_without_autocast": torch.float16}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", ["ema", "trust_region"])
def test_small_updates_arrive(tmp_path, folder, given, kind):
    settings = {"bf16": True, "optim": "adamw_torch", "learning_rate": RATE, "max_steps": 3, **GIVEN[given]}
    policy = folder
    if given in DTYPES:
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[given])
    args = config(tmp_path, teacher_model_kind=kind, **settings)
    made = trainer(args, network=policy)
    start = weights(made.model)
    made.train()
    share, largest = moved(start, made.model)
    assert share > 0.9 and largest < 3.2 * RATE
    dtypes = {p.dtype for network in (made.model, made.teacher.model) for p in network.parameters()}
    assert dtypes == {torch.float32}


ADAPTERS = {
    "lora": ({}, True),
    "dora": ({"use_dora": True}, True),
    "tokens": ({"trainable_token_indices": [5, 6]}, True),
    "whole_modules": ({"modules_to_save": ["lm_head"]}, False),
    "biases": ({"bias": "all"}, True),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_an_adapter_trains_is_fp32_and_its_base_may_stay(tmp_path, folder, kind):
    settings, base_stays = ADAPTERS[kind]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    args = config(tmp_path, bf16=True, optim="adamw_torch", learning_rate=RATE, max_steps=3)
    made = trainer(args, network=base, peft_config=adapter)
    start = {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}
    assert start and {value.dtype for value in start.values()} == {torch.float32}
    frozen = {p.dtype for p in made.model.parameters() if not p.requires_grad}
    assert frozen == ({torch.bfloat16} if base_stays else {torch.float32})
    made.train()
    assert moved(start, made.model)[0] > 0.9
    ids = torch.tensor([[5, 6, 7]])  # evaluation and generation run outside of autocast
    assert made.model.eval()(input_ids=ids).logits.isfinite().all()


def test_an_adapter_from_disk_in_bf16_is_trained_in_fp32(tmp_path, folder):
    def base():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    get_peft_model(base(), LoraConfig(r=4)).bfloat16().save_pretrained(tmp_path / "adapter")
    policy = PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    made = trainer(config(tmp_path, bf16=True), network=policy)
    assert {p.dtype for p in made.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("mean", ["tokens", "rows"])
def test_the_supervised_start_is_in_fp32_too(tmp_path, folder, mean):
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    start = weights(policy)
    args = SFTConfig(
        output_dir=str(tmp_path), bf16=True, use_cpu=True, learning_rate=RATE, max_steps=3, save_strategy="no",
        report_to="none", lr_scheduler_type="constant",
    )  # fmt: skip
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    trained = sft(policy, tokenizer(), [row] * 8, args, mean=mean)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert moved(start, trained)[0] > 0.5  # rows of the embeddings that no text uses get no gradient


def test_full_evaluation_in_low_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="bf16_full_eval: true rounds the policy's own weights"):
        trainer(config(tmp_path, bf16_full_eval=True))


def test_a_policy_that_cannot_train_is_refused(tmp_path, folder):
    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(r=4)).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    for policy in (frozen, model().requires_grad_(False)):
        with pytest.raises(ValueError, match="no weight that trains"):
            trainer(config(tmp_path), network=policy)


def deepspeed_args(**bf16):
    plugin = types.SimpleNamespace(zero_stage=2, deepspeed_config={"bf16": {"enabled": True, **bf16}})
    return types.SimpleNamespace(
        deepspeed_plugin=plugin, bf16=True, fp16=False, bf16_full_eval=False, fp16_full_eval=False
    )


def test_only_deepspeed_is_given_bf16_weights(tmp_path):
    args = config(tmp_path, bf16=True)
    assert loading_options(None, args)["dtype"] == "float32"
    assert loading_options(None, args, adapter=True)["dtype"] == "bfloat16"
    assert loading_options({"dtype": "float16"}, args)["dtype"] == "float16"
    assert loading_options(None, deepspeed_args())["dtype"] == "bfloat16"
    network = model().bfloat16()
    train_in_fp32(network, deepspeed_args())
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    check_precision(deepspeed_args())
    with pytest.raises(ValueError, match="bf16_master_weights_and_grads: small updates are then rounded away"):
        check_precision(deepspeed_args(bf16_master_weights_and_grads=True))
    with pytest.raises(ValueError, match="a NaN in one gradient would then become the weights; remove that line"):
        check_precision(deepspeed_args(check_grad_overflow=False))
