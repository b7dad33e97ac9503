"""Texts and token ids: what a turn says, text of others as ids that are only text, and where reasoning begins.

**Text of others.** A pool member or a game may write `<|im_end|>`, `<think>` or `</search>`. Tokenizers turn such
strings into control tokens: special ones unless told otherwise (`split_special_tokens=True`), and added ones that
are not special (`<think>` of Qwen3, the tags of a tiny tokenizer) always. Here the text is cut inside every such
string and the pieces are encoded one by one, so that the ids can never be those of a control token; the characters
stay as they were.

**Reasoning.** R1 distillations and Qwen3-Thinking end their generation prompt with `<think>`, so that what they sample
is `why</think><route>a</route>`. Whoever reads such a completion reads it with the tag before it, as the model did. A
template that opens *and closes* an empty block (Qwen3 with `enable_thinking: false`) leaves nothing open.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from srpo.types import Observation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNKNOWN = "\ufffd"


def well_formed(text: str) -> str:
    """The text with every lone surrogate replaced: no tokenizer and no file takes one. A pair becomes its letter."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def reader(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Ids -> a turn as the world, the rewards and the tables read it: no special tokens, nothing tidied up."""
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """`reader` for one turn."""
    return reader(tokenizer)(ids)


def encode_untrusted(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` that hold no special token and no added token of two or more characters, in linear time.

    An added token of one character that is not special is a letter of the alphabet, not a control token, and stays.
    A character that the tokenizer can only write with a control token becomes U+FFFD, or nothing.
    """
    text = well_formed(text)  # lone surrogates cannot be encoded
    if not text:
        return []
    forbidden, seam = _rules(tokenizer, len(tokenizer))
    pieces = [text] if seam is None else [piece for piece in seam.sub(_cut, text).split(_CUT) if piece]
    return [i for piece in pieces for i in _clean(tokenizer, piece, forbidden)]


def encode_frame(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of the library's own text, control tokens included; nothing is added."""
    return list(tokenizer(well_formed(text), add_special_tokens=False)["input_ids"]) if text else []


def observation_ids(observation: Observation, tokenizer: Any, limit: int) -> tuple[int, ...]:
    """Ids of an observation: the body is cut to `limit` tokens first and framed then, so no frame is ever torn. The
    aside gets what the body leaves of the limit, and loses its head."""
    body = encode_untrusted(tokenizer, observation.body)[:limit] if observation.body else []
    if observation.aside:
        between = encode_frame(tokenizer, observation.between)
        room = limit - len(body) - len(between)
        aside = encode_untrusted(tokenizer, observation.aside)[-room:] if room > 0 else []
        body = [*body, *between, *aside] if aside else body
    return (*encode_frame(tokenizer, observation.before), *body, *encode_frame(tokenizer, observation.after))


_CUT = "\ud800"  # a lone surrogate: cannot be in the text any more


def _cut(match: re.Match[str]) -> str:
    return match.group() + _CUT


@lru_cache(maxsize=8)
def _rules(tokenizer: Any, _size: int) -> tuple[frozenset[int], re.Pattern[str] | None]:
    """(ids that may not appear, pattern of the first character of what could be one of them).

    The pattern looks one character ahead only: linear however many added tokens there are (Gemma has 6,000).
    """
    added = dict(tokenizer.added_tokens_decoder)
    forbidden = {i for i, token in added.items() if token.special or len(token.content) > 1}
    forbidden.update(tokenizer.all_special_ids)
    following: dict[str, set[str]] = {}
    for i in forbidden:
        content = added[i].content if i in added else tokenizer.convert_ids_to_tokens(i)
        if len(content) > 1:
            following.setdefault(content[0], set()).add(content[1])
    if not following:
        return frozenset(forbidden), None
    heads = (f"{re.escape(a)}(?=[{''.join(map(re.escape, sorted(bs)))}])" for a, bs in sorted(following.items()))
    return frozenset(forbidden), re.compile("|".join(heads))


def _clean(tokenizer: Any, piece: str, forbidden: frozenset[int]) -> list[int]:
    ids = list(tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if forbidden.isdisjoint(ids):
        return ids
    # Left over: a tokenizer that normalises first (full-width letters become a tag), or one without a byte for this.
    if len(piece) > 1:
        half = len(piece) // 2
        return _clean(tokenizer, piece[:half], forbidden) + _clean(tokenizer, piece[half:], forbidden)
    return [] if piece == _UNKNOWN else _clean(tokenizer, _UNKNOWN, forbidden)


def without_control_tokens(tokenizer: Any, keep: Collection[str] = ()) -> Callable[[str], str]:
    """A function that breaks every control token that a text spells out ("<|im_end|>" becomes "< |im_end|>").

    A chat template is text, and would read it as the end of the user's turn. Control tokens are the special ones and,
    as in `encode_untrusted`, added ones of two or more characters, such as Qwen's <tool_call> or a policy's
    labels; `keep` are those that the text may say. Lone surrogates, which no tokenizer takes, are replaced.
    """
    control = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    control -= set(keep)
    long = sorted((content for content in control if len(content.strip()) > 1), key=len, reverse=True)
    if not long:
        return well_formed
    pattern = re.compile("|".join(map(re.escape, long)))
    return lambda text: pattern.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", well_formed(text))


class LockedTokenizer:
    """A tokenizer for several threads.

    A fast tokenizer keeps `split_special_tokens` of the last call as its own state, so that text of others, encoded in
    one thread, could be read with the setting of another thread's call.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return self._tokenizer(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._tokenizer, name)
        if not callable(found):
            return found

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return found(*args, **kwargs)

        return locked


THINK, CLOSED = "<think>", "</think>"
_TAIL = 16
"""Ids at the end of a prompt that are looked at: the tag, however it is cut into tokens, and white space."""


def opened_in(prompt: str) -> str:
    """The think tag that a rendered prompt ends with, white space aside; "": it leaves none open."""
    return THINK if prompt.rstrip().endswith(THINK) else ""


def opened_by(tokenizer: Any, prompt_ids: Sequence[int]) -> str:
    """`opened_in` for a prompt's ids.

    Raises:
        ValueError: the tag is a special token, so that no text of a completion would show where the reasoning ends.
    """
    opened = opened_in(tokenizer.decode(list(prompt_ids[-_TAIL:]), skip_special_tokens=False))
    if opened and {THINK, CLOSED} & set(tokenizer.all_special_tokens):
        raise ValueError(
            f"the chat template opens {THINK} in the prompt and the tokenizer has {THINK} or {CLOSED} as a special "
            "token, which texts do not show: make them ordinary added tokens, or use a template that opens no block "
            "(often chat_template_kwargs: {enable_thinking: false})"
        )
    return opened


def inside(opened: str, text: str) -> str:
    """The text without the tag that its prompt has opened already, as the policy would write it."""
    return text.removeprefix(opened).lstrip() if opened else text


def unfinished(opened: str, text: str) -> str:
    """A completion with the tag that its prompt opened, where the completion closes it."""
    return opened + text if CLOSED in text else text
