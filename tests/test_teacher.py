"""The self-teacher's weights: where they start, when they move, and that nothing else moves them."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from core_helpers import config, equal, model, tokenizer, trainer, weights
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file
from trl.trainer.utils import add_fused_lm_head

from srpo.adapters import prepare_adapter
from srpo.teacher import Teacher, unpatched_copy

RATE = 0.05


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def batch(rows=3, prompt=5, completion=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(tokenizer()), (rows, prompt + completion), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    return ids, mask, completion


def full(kind, accelerator, rate=RATE, dtype=torch.float32):
    student = model().to(dtype)
    twin = None if kind == "live" else unpatched_copy(student, {}, in_fp32=kind == "ema")
    add_fused_lm_head(student)
    return student, Teacher(kind, student, twin, rate, accelerator)


def lora(kind, accelerator, rate=RATE, dtype=torch.float32, name="default", **options):
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    student = get_peft_model(model().to(dtype), LoraConfig(**settings), adapter_name=name)
    return student, Teacher(kind, student, None, rate, accelerator)


def other_adapter(kind, accelerator, rate=RATE, dtype=torch.float32):
    """Adapters whose parameters end in the adapter's name, magnitudes, and a module that is trained whole."""
    options = {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "modules_to_save": ["v_proj"]}
    return lora(kind, accelerator, rate, dtype, **options)


def own_head(kind, accelerator, rate=RATE, dtype=torch.float32):
    """Biases, embeddings of single tokens and with them rows of the tied head: all of it moves."""
    student = get_peft_model(
        model().to(dtype), LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[5, 6], bias="all")
    )
    prepare_adapter(student, accelerator)
    return student, Teacher(kind, student, None, rate, accelerator)


MAKERS = {"full": full, "lora": lora, "other_adapter": other_adapter, "own_head": own_head}


def logits(teacher):
    ids, mask, length = batch()
    return teacher.head().logits(teacher.score(ids, mask, length).flatten(0, 1)).detach()


def plain_logits(network):
    ids, mask, length = batch()
    with torch.no_grad():
        return network(input_ids=ids, attention_mask=mask).logits[:, -1 - length : -1].flatten(0, 1).float()


@torch.no_grad()
def perturb(student, size=0.3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))


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


def own_weights(teacher):
    return lambda: weights(teacher.model) if teacher.weights is None else dict(teacher.weights.values)


def student_weights(teacher):
    own = weights(teacher.student)
    return own if teacher.weights is None else {name: own[name] for name in teacher.weights.values}


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
    student = model()
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


# ----------------------------------------------------------------------------------------------------- checkpoints


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
