"""Students of every kind with their teachers, and what either says on one batch."""

import torch
from core_helpers import model, tokenizer, weights
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from srpo.prefix.sharing import PrefixSharing
from srpo.teacher.lm_head import add_scoring_head
from srpo.teacher.teacher import Teacher, unpatched_copy
from srpo.trainer.adapters import prepare_adapter

RATE = 0.05


def batch(rows=3, prompt=5, completion=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, len(tokenizer()), (rows, prompt + completion), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # left padding
    return ids, mask, completion


def scoring(network):
    add_scoring_head(network, PrefixSharing(network, "off"))
    return network


def full(kind, accelerator, rate=RATE, dtype=torch.float32):
    student = model().to(dtype)
    twin = None if kind == "live" else unpatched_copy(student, {}, in_fp32=kind == "ema")
    add_fused_lm_head(student)
    scoring(student)
    if twin is not None:
        scoring(twin)
    return student, Teacher(kind, student, twin, rate, accelerator)


def lora(kind, accelerator, rate=RATE, dtype=torch.float32, name="default", **options):
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    student = get_peft_model(scoring(model().to(dtype)), LoraConfig(**settings), adapter_name=name)
    return student, Teacher(kind, student, None, rate, accelerator)


def other_adapter(kind, accelerator, rate=RATE, dtype=torch.float32):
    """Adapters whose parameters end in the adapter's name, magnitudes, and a module that is trained whole."""
    options = {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "modules_to_save": ["v_proj"]}
    return lora(kind, accelerator, rate, dtype, **options)


def own_head(kind, accelerator, rate=RATE, dtype=torch.float32):
    """Biases, embeddings of single tokens and with them rows of the tied head: all of it moves."""
    student = get_peft_model(
        scoring(model().to(dtype)),
        LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[5, 6], bias="all"),
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


def own_weights(teacher):
    return lambda: weights(teacher.model) if teacher.weights is None else dict(teacher.weights.values)


def student_weights(teacher):
    own = weights(teacher.student)
    return own if teacher.weights is None else {name: own[name] for name in teacher.weights.values}
