"""The self-teacher's weights: where they start, when they move, and that nothing else moves them."""

import copy

import pytest
import torch
from accelerate import Accelerator
from core_helpers import config, equal, model, trainer, weights
from peft import LoraConfig
from teacher_cases import (
    MAKERS,
    RATE,
    batch,
    full,
    logits,
    lora,
    own_weights,
    perturb,
    plain_logits,
    scoring,
    student_weights,
)  # fmt: skip
from trl.trainer.utils import add_fused_lm_head

from srpo.teacher.teacher import Teacher, unpatched_copy


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


# ------------------------------------------------------------------------------------------------------------- EMA


@pytest.mark.parametrize("policy", MAKERS)
def test_ema_closed_form(accelerator, policy):
    student, teacher = MAKERS[policy]("ema", accelerator)
    own = own_weights(teacher)
    start = {name: value.double() for name, value in own().items()}
    perturb(student)
    target = {name: value.double() for name, value in student_weights(teacher).items()}
    assert max((start[n] - target[n]).abs().max() for n in start) > 0.1
    for steps in (1, 7, 20):
        for _ in range(steps):
            teacher.update()
        n = {1: 1, 7: 8, 20: 28}[steps]
        for name, value in own().items():
            expected = target[name] + (1 - RATE) ** n * (start[name] - target[name])
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_ema_of_a_bf16_student_is_kept_in_fp32(accelerator, policy):
    student, teacher = MAKERS[policy]("ema", accelerator, dtype=torch.bfloat16)
    if policy == "lora":  # as after quantised training: the trained adapter itself is bf16
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        teacher.begin()
    own = own_weights(teacher)
    assert {value.dtype for value in own().values()} == {torch.float32}
    start = {name: value.double() for name, value in own().items()}
    perturb(student, size=0.01)
    target = {name: value.double() for name, value in student_weights(teacher).items()}
    for _ in range(10):
        teacher.update()
    for name, value in own().items():
        expected = target[name] + (1 - RATE) ** 10 * (start[name] - target[name])
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "steps", "at"),
    [
        ({"gradient_accumulation_steps": 2}, 3, [1, 2, 3]),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 6, [2, 4, 6]),
        ({"gradient_accumulation_steps": 2, "num_iterations": 2}, 6, [2, 4, 6]),
        ({"gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 2}, 9, [4, 8]),
    ],
)
def test_the_teacher_moves_once_per_generation_batch(tmp_path, changes, steps, at):
    made = trainer(config(tmp_path, per_device_train_batch_size=4, max_steps=steps, **changes))
    expected = {name: value.double() for name, value in weights(made.teacher.model).items()}
    moved, update = [], made.teacher.update

    def spy():
        update()
        moved.append(made.state.global_step)
        for name, value in weights(made.model).items():
            expected[name] = (1 - RATE) * expected[name] + RATE * value.double()

    made.teacher.update = spy
    made.train()
    assert moved == at
    for name, value in weights(made.teacher.model).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------- the student does not move it


@pytest.mark.parametrize("policy", MAKERS)
@pytest.mark.parametrize("kind", ["ema", "frozen"])
def test_perturbing_the_student_leaves_the_teacher(accelerator, kind, policy):
    student, teacher = MAKERS[policy](kind, accelerator)
    before, student_before = logits(teacher), plain_logits(student)
    torch.testing.assert_close(before, student_before, rtol=1e-5, atol=1e-5)  # it starts as the student
    perturb(student)
    assert (plain_logits(student) - student_before).abs().max() > 0.1
    assert torch.equal(logits(teacher), before)


def test_both_forwards_of_the_copy_run_its_own_weights(accelerator):
    student, teacher = full("frozen", accelerator)
    trap = copy.deepcopy(student)  # a copy of a patched model runs the student's weights: what must not be done
    add_fused_lm_head(teacher.model)
    ids, mask, _ = batch()

    def fused(network):
        with torch.no_grad():
            return network(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs

    plain_before, fused_before, trap_before = plain_logits(teacher.model), fused(teacher.model), plain_logits(trap)
    perturb(student)
    assert torch.equal(plain_logits(teacher.model), plain_before)
    assert torch.equal(fused(teacher.model), fused_before)
    assert not torch.equal(plain_logits(trap), trap_before), "the trap is gone: this test no longer shows anything"


@pytest.mark.parametrize("kind", ["ema", "trust_region", "frozen"])
@pytest.mark.parametrize("peft", [False, True])
def test_the_optimiser_never_sees_the_teacher(tmp_path, kind, peft):
    lora_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if peft else None
    made = trainer(config(tmp_path, teacher_model_kind=kind, max_steps=2), peft_config=lora_config)
    before = {n: v.clone() for n, v in own_weights(made.teacher)().items()}
    before_student = student_weights(made.teacher)
    made.train()
    optimised = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    if peft:
        theirs = made.teacher.weights.values
        trained = {n for n, p in made.model.named_parameters() if p.requires_grad}
        assert theirs.keys() == trained and all(".default." in name for name in trained)
        assert list(made.model.peft_config) == ["default"]
        assert made.model.active_adapter == "default"
    else:
        theirs = dict(made.teacher.model.named_parameters())
    assert not optimised & {id(p) for p in theirs.values()}
    assert all(p.grad is None and not p.requires_grad for p in theirs.values())
    assert not equal(before_student, student_weights(made.teacher))
    assert equal(before, {n: v.clone() for n, v in own_weights(made.teacher)().items()}) is (kind != "ema")


# ------------------------------------------------------------------------------------------------------------ LoRA


def test_the_lora_teacher_starts_as_the_student(accelerator):
    _, teacher = lora("ema", accelerator)
    assert equal(student_weights(teacher), own_weights(teacher)())
    assert all(value.abs().max() > 0 for value in own_weights(teacher)().values())  # TRL's starts from zero


def test_scoring_and_updating_leave_the_active_adapter_alone(accelerator):
    student, teacher = lora("ema", accelerator, name="policy")
    grads = {name: p.requires_grad for name, p in student.named_parameters()}
    assert any(grads.values())
    assert student.active_adapter == "policy"
    before = student_weights(teacher)
    logits(teacher)
    teacher.update()
    assert student.active_adapter == "policy"
    assert {name: p.requires_grad for name, p in student.named_parameters()} == grads
    assert equal(student_weights(teacher), before)


def test_no_dropout_in_the_teachers_pass_and_the_mode_comes_back(accelerator):
    student, teacher = lora("ema", accelerator, lora_dropout=0.5)
    student.train()
    assert torch.equal(logits(teacher), logits(teacher))
    assert student.training and all(module.training for module in student.modules())


# ------------------------------------------------------------------------------------------- the other three kinds


@pytest.mark.parametrize("policy", MAKERS)
def test_trust_region_mixes_logits(accelerator, policy):
    student, teacher = MAKERS[policy]("trust_region", accelerator, rate=0.3)
    first = plain_logits(student)
    perturb(student)
    student_now = plain_logits(student)
    assert (first - student_now).abs().max() > 0.1
    torch.testing.assert_close(logits(teacher), 0.7 * first + 0.3 * student_now, rtol=1e-5, atol=1e-5)
    teacher.update()
    torch.testing.assert_close(logits(teacher), 0.7 * first + 0.3 * student_now, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", MAKERS)
def test_frozen_never_moves_and_live_is_the_student(accelerator, policy):
    frozen_student, frozen = MAKERS[policy]("frozen", accelerator)
    before = logits(frozen)
    perturb(frozen_student)
    frozen.update()
    assert torch.equal(logits(frozen), before)

    student, live = MAKERS[policy]("live", accelerator)
    perturb(student)
    torch.testing.assert_close(logits(live), plain_logits(student), rtol=1e-5, atol=1e-5)


def test_several_steps_per_batch_keep_the_head_of_scoring_time(accelerator):
    student = scoring(model())
    live = Teacher("live", student, None, RATE, accelerator, snapshot_head=True)
    ids, mask, length = batch()
    hidden, head = live.score(ids, mask, length), live.head()
    before = head.logits(hidden[0])
    perturb(student)
    assert torch.equal(head.logits(hidden[0]), before)


def test_a_missing_copy_and_soft_caps_are_named(accelerator):
    with pytest.raises(ValueError, match="copy of the policy"):
        Teacher("ema", model(), None, RATE, accelerator)
    student = model()
    twin = unpatched_copy(student, {}, in_fp32=False)
    student.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="soft-capped"):
        Teacher("trust_region", student, twin, RATE, accelerator)
