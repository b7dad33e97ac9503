"""Which ids end a policy's text and which pad it: one answer for training, warm start, evaluation and agents.

    end    the tokenizer's end token, and those that the model's generation configuration names
    pad    the tokenizer's pad token, else the first end token: padding is masked in every pass, so it may be that one

Without an end token a policy writes to the limit each time, and whatever was cut counts as no success. An id outside
the model's vocabulary ends the run in the embeddings, on a GPU with an assertion of the device.
"""

from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

_USUAL_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>",
    "[EOS]", "[SEP]",
)  # fmt: skip


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a turn of a policy, in order.

    Raises:
        ValueError: there is none in the model's vocabulary, or the tokenizer's own is outside it.
    """
    _check(tokenizer.eos_token_id, _vocabulary(model), "end", tokenizer)
    ends = known_ends(model, tokenizer)
    if not ends:
        vocabulary = tokenizer.get_vocab()
        present = [repr(token) for token in _USUAL_ENDS if token in vocabulary]
        hint = f" (its vocabulary has {', '.join(present)})" if present else ""
        raise ValueError(
            "the policy has no end token, so that no text of it could end: neither the tokenizer nor the model's "
            f"generation_config names one. Set tokenizer.eos_token{hint} and save it with the model"
        )
    return ends


def known_ends(model: Any, tokenizer: Any) -> list[int]:
    """As `end_ids`, for members of a pool, which a limit may end every time: there may be none."""
    size = _vocabulary(model)
    named = model.generation_config.eos_token_id
    named = [i for i in (named if isinstance(named, list) else [named]) if i is not None]
    if odd := [i for i in named if not 0 <= i < size]:
        logger.warning_once(
            f"the model's generation_config names end tokens outside its vocabulary of {size} ids, which cannot be "
            f"written and are left out: {', '.join(map(str, odd))}"
        )
    return sorted({i for i in (tokenizer.eos_token_id, *named) if i is not None and 0 <= i < size})


def pad_id(model: Any, tokenizer: Any) -> int:
    """The id that fills rows of unequal length.

    Raises:
        ValueError: it is outside the model's vocabulary, or there is neither a pad nor an end token.
    """
    _check(tokenizer.pad_token_id, _vocabulary(model), "pad", tokenizer)
    return end_ids(model, tokenizer)[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def settle_special_tokens(model: Any, tokenizer: Any) -> list[int]:
    """For training: gives a tokenizer the end and pad token that it lacks, so that they are saved with it.

    Returns:
        `end_ids`, the tokenizer's own first.

    Raises:
        ValueError: as `end_ids` and `pad_id`; or the chat template writes tokens that the model has no embeddings for.
    """
    size = _vocabulary(model)
    ends, pad = end_ids(model, tokenizer), pad_id(model, tokenizer)
    template = str(tokenizer.chat_template or "")
    for token, i in tokenizer.get_added_vocab().items():
        if i >= size and token in template:
            raise ValueError(_outside(f"token {token!r} of the chat template", i, size))
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
        logger.warning(
            f"the tokenizer has no end token; it gets the model's, {tokenizer.eos_token!r}, and is saved with it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return sorted(ends, key=lambda i: i != tokenizer.eos_token_id)


def _vocabulary(model: Any) -> int:
    # Of the configuration: ZeRO-3 has emptied the embeddings themselves.
    return int(model.config.get_text_config().vocab_size)


def _check(i: int | None, size: int, kind: str, tokenizer: Any) -> None:
    if i is not None and not 0 <= i < size:
        token = tokenizer.eos_token if kind == "end" else tokenizer.pad_token
        raise ValueError(_outside(f"{kind} token {token!r}", i, size))


def _outside(what: str, i: int, size: int) -> str:
    return (
        f"the tokenizer's {what} has the id {i}, and the model has embeddings for {size} ids only: set one that the "
        "model knows, or call model.resize_token_embeddings(len(tokenizer)) and save model and tokenizer together"
    )
