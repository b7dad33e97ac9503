"""What a run with a teacher writes: the policy in the policy's files, the teacher in one of its own."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from core_helpers import config, equal, model, trainer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file
from teacher_cases import MAKERS, full, lora, own_weights, perturb, plain_logits, student_weights


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("policy", MAKERS)
def test_save_and_load_bit_for_bit(accelerator, policy, tmp_path):
    student, teacher = MAKERS[policy]("ema", accelerator)
    perturb(student)
    teacher.update()
    teacher.save(str(tmp_path))
    kept = {n: v.clone() for n, v in own_weights(teacher)().items()}
    other_student, other = MAKERS[policy]("ema", accelerator)
    perturb(other_student, seed=2)
    other.update()
    assert not equal(kept, own_weights(other)())
    student_before = student_weights(other)
    other.load(str(tmp_path))
    assert equal(kept, {n: v.clone() for n, v in own_weights(other)().items()})
    assert equal(student_before, student_weights(other))


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "tokens": {"trainable_token_indices": [5, 6]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole_head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["default", "policy"])
def test_a_saved_policy_is_the_policy_and_nothing_else(tmp_path, kind, name):
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **ADAPTERS[kind]}
    start = get_peft_model(model(), LoraConfig(**settings), adapter_name=name)
    if kind != "bias":  # PEFT allows biases in one adapter only
        start.add_adapter("other", LoraConfig(**settings))
    start.save_pretrained(tmp_path / "start", selected_adapters=[name])
    alone = tmp_path / "start" / ("" if name == "default" else name) / "adapter_model.safetensors"
    args = config(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    made = trainer(args, network=start)
    before = student_weights(made.teacher)
    made.train()
    assert not equal(before, student_weights(made.teacher))
    made.save_model(str(tmp_path / "policy"))
    made.model.save_pretrained(tmp_path / "by_hand")
    wanted = plain_logits(made.model.eval())
    for folder in (tmp_path / "policy", tmp_path / "by_hand", tmp_path / "run" / "checkpoint-2"):
        assert not [path for path in folder.iterdir() if path.is_dir()]
        assert load_file(folder / "adapter_model.safetensors").keys() == load_file(alone).keys()
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            saved = PeftModel.from_pretrained(model(), folder).eval()
        torch.testing.assert_close(plain_logits(saved), wanted, rtol=1e-5, atol=1e-5)
    own = load_file(tmp_path / "run" / "checkpoint-2" / "teacher.safetensors")
    assert own.keys() == made.teacher.weights.values.keys()


def test_the_copy_for_the_kl_term_is_not_saved(tmp_path):
    policy = get_peft_model(model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    made = trainer(config(tmp_path, beta=0.1, save_strategy="steps", save_steps=1), network=policy)
    made.train()
    assert not (tmp_path / "checkpoint-1" / "ref").exists()
    copied = copy.deepcopy(made.model)  # the rule goes with a copy, and saves that copy
    perturb(copied)
    copied.save_pretrained(tmp_path / "copy")
    saved = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.{}weight"
    assert torch.equal(saved[name.format("")], copied.get_parameter(name.format("default.")))
    assert [path.name for path in (tmp_path / "copy").iterdir() if path.is_dir()] == []


def test_teacher_weights_of_another_adapter_are_named(accelerator, tmp_path):
    _, teacher = lora("ema", accelerator)
    teacher.save(str(tmp_path))
    _, other = lora("ema", accelerator, r=8)
    with pytest.raises(ValueError, match=r"teacher.safetensors holds other weights than those that train here"):
        other.load(str(tmp_path))


def test_several_active_adapters_are_refused(tmp_path):
    policy = get_peft_model(model(), LoraConfig(r=4, target_modules="all-linear"))
    policy.add_adapter("second", LoraConfig(r=4, target_modules="all-linear"))
    policy.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"2 active adapters \(default, second\)"):
        trainer(config(tmp_path), network=policy)


def test_a_checkpoint_without_a_teacher_is_named(accelerator, tmp_path):
    _, teacher = full("ema", accelerator)
    words = r"not written by this objective and teacher kind \(ema\)"
    with pytest.raises(FileNotFoundError, match=words):
        teacher.load(str(tmp_path))
    # From GRPO to SRPO: the run stops before its first step, instead of starting with a fresh teacher unnoticed.
    trainer(config(tmp_path, objective="grpo", save_strategy="steps", save_steps=1)).train()
    with pytest.raises(FileNotFoundError, match=words):
        trainer(config(tmp_path, max_steps=2)).train(resume_from_checkpoint=True)
