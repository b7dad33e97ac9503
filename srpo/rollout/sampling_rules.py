"""What samples is what the recipe says, and what is scored is what sampled.

Our generator reads the recipe. Where TRL samples, `model.generate` fills every setting that it is not given from the
checkpoint's `generation_config.json` (min_p, suppressed tokens, penalties, beams, stop strings, ...), and
`generation_kwargs` of the recipe reaches it unread, as it reaches vLLM. The trainer's log-probs know the temperature
only. So a checkpoint has a say in its special tokens alone, and `generation_kwargs` holds only what moves no
probability and ends no completion.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from srpo.ranges import Ranges, above, at_least, between, check_numbers

logger = logging.get_logger(__name__)

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What a checkpoint's generation configuration decides: which ids begin, end and fill."""

_HARMLESS = {
    "transformers": {
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config",
    },
    "vLLM": {"detokenize", "skip_special_tokens", "spaces_between_special_tokens"},
}  # fmt: skip
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "stop": "stop_strings (with environment=)",
    "stop_strings": "stop_strings (with environment=)",
    "n": "num_generations",
    "num_return_sequences": "num_generations",
}
"""The fields of the configuration that say what some of the refused keys would."""


@dataclass(frozen=True)
class Sampling:
    """Names and meanings of TRL's `GRPOConfig`; `temperature=0` takes the most likely token.

    Raises:
        ValueError: a number out of its range.
    """

    RANGES: ClassVar[Ranges] = {
        "temperature": at_least(0),
        "top_p": between(0, 1, open_low=True),
        "top_k": at_least(0),
        "min_p": between(0, 1),
        "repetition_penalty": above(0),
    }

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end a turn (closing tags); the turn keeps them."""

    def __post_init__(self) -> None:
        check_numbers(self)

    @cached_property
    def cuts(self) -> bool:
        """Whether free text is drawn from another distribution than the model's at this temperature."""
        return bool(self.top_k or self.min_p) or self.top_p < 1.0 or self.repetition_penalty != 1.0

    @cached_property
    def whole(self) -> "Sampling":
        """The same temperature without the cuts: how a trainer scores."""
        return Sampling(self.temperature)

    @cached_property
    def rules(self) -> LogitsProcessorList:
        """On logits of free text, in the order of transformers' own `generate`."""
        rules = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            rules.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1.0):
            rules.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            rules.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            rules.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            rules.append(MinPLogitsWarper(self.min_p))
        return rules


def without_adapter(model: Any) -> Any:
    """The transformers model inside a PEFT one; any other is itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def own_settings_aside(model: Any) -> Iterator[None]:
    """Inside, `model.generate` reads nothing of the model's own generation configuration but its special tokens.

    Afterwards the model has its configuration back, the same object: it is saved and pushed as it came.
    """
    both = (model, without_adapter(model))
    holders = [(m, m.generation_config) for m in {id(m): m for m in both}.values() if _holds(m)]
    for holder, found in holders:
        holder.generation_config = GenerationConfig(**{name: getattr(found, name, None) for name in _TOKENS})
    try:
        yield
    finally:
        for holder, found in holders:
            holder.generation_config = found


def _holds(model: Any) -> bool:
    return vars(model).get("generation_config") is not None


def check_generation_kwargs(args: Any) -> None:
    """ValueError for keys of `generation_kwargs` that would change what is sampled, but not what is scored."""
    engine = "vLLM" if args.use_vllm else "transformers"
    for name in args.generation_kwargs or {}:
        if name not in _HARMLESS[engine]:
            field = f"; the field {_FIELDS[name]} says the same" if name in _FIELDS else ""
            raise ValueError(
                f"generation_kwargs: {name!r} changes what {engine} samples or where a completion ends, and the "
                f"scored log-probs do not know it{field}. Allowed are {', '.join(sorted(_HARMLESS[engine]))}"
            )


def samples_itself(args: Any, model: Any, is_vlm: bool, needs: Sequence[str]) -> bool:
    """Whether `srpo.rollout.generator` samples completions of one turn; else TRL does, by transformers' `generate`.

    TRL does for policies of text and pictures, in continuous batching, and where PEFT puts virtual tokens before every
    prompt, which is said.

    Args:
        model: the policy, after PEFT has wrapped it.
        needs: arguments that transformers' `generate` cannot serve, by name.

    Raises:
        ValueError: `generation_kwargs` that our generator does not read; `needs` with virtual tokens.
    """
    if is_vlm or args.use_transformers_continuous_batching:
        return False
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        if needs:
            raise ValueError(
                f"{', '.join(needs)}: not with PEFT's virtual tokens (prompt or prefix tuning), as no generator of "
                "ours feeds them; train a LoRA adapter or all weights"
            )
        logger.warning("the policy has virtual tokens: transformers' own generate samples it, prompt by prompt")
        return False
    if args.generation_kwargs:
        raise ValueError(
            f"generation_kwargs: {', '.join(args.generation_kwargs)}: only transformers' own generate reads it, which "
            "samples policies of text and pictures, and with use_transformers_continuous_batching; leave it out"
        )
    return True


def unscored_settings(args: Any) -> list[str]:
    """Fields that cut or bend the sampling distribution, as `name=value`; the scored log-probs are of all of it."""
    neutral = {
        "top_p": (1.0, None),
        "top_k": (0, -1, None),
        "min_p": (0.0, None),
        "repetition_penalty": (1.0, None),
        "vllm_structured_outputs_regex": (None,),
    }
    return [f"{name}={getattr(args, name)}" for name, values in neutral.items() if getattr(args, name) not in values]
