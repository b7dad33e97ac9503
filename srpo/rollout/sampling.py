"""How one token is drawn from logits: the sampling distribution, named seeds, and where a turn ends."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from srpo.ranges import Ranges, above, at_least, between, check_numbers


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

    @property
    def cuts(self) -> bool:
        """Whether free text is drawn from another distribution than the model's at this temperature."""
        return bool(self.top_k or self.min_p) or self.top_p < 1.0 or self.repetition_penalty != 1.0


def draw(
    logits: Tensor,
    sampling: Sampling,
    uniforms: Sequence[float],
    choices: Sequence[Sequence[int] | None],
    contexts: Sequence[Sequence[int]] | None = None,
) -> tuple[list[int], list[float]]:
    """One token per row, and its log-probability (nats) as a trainer scores it: at this temperature and among the
    row's choices, but of the whole distribution, which top-k, top-p, min-p and the penalty take a part of.

    Old, new and reference log-probs know no such cut, in TRL neither: under the cut ones, their ratio would be the
    mass that was kept, and not 1, before the policy has moved.

    Inverse transform sampling in float64: the token is a function of the row's logits and its own uniform number.

    Args:
        logits: [n, V].
        uniforms: n numbers in [0, 1), of the rows' own generators.
        choices: per row the ids that are allowed, or None. A choice is drawn at `temperature` from the probabilities
            renormalised over them; top_p, top_k, min_p and the penalty do not apply to it.
        contexts: per row all ids before the token; needed by the repetition penalty only.
    """
    scores = _scores(logits, sampling, choices, contexts or ())
    logp = torch.log_softmax(scores, dim=-1)
    if sampling.temperature == 0:
        ids = scores.argmax(dim=-1)
    else:
        mass = logp.exp().cumsum(dim=-1, dtype=torch.float64)
        points = torch.tensor(uniforms, dtype=torch.float64, device=mass.device).unsqueeze(1) * mass[:, -1:]
        ids = torch.searchsorted(mass, points, right=True).squeeze(1)
        if (beyond := ids == logits.size(1)).any():  # rounding at the very end
            ids = torch.where(beyond, scores.argmax(dim=-1), ids)
    if sampling.cuts:
        logp = torch.log_softmax(_scores(logits, Sampling(sampling.temperature), choices, ()), dim=-1)
    return ids.tolist(), logp.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()


def _scores(
    logits: Tensor, sampling: Sampling, choices: Sequence[Sequence[int] | None], contexts: Sequence[Sequence[int]]
) -> Tensor:
    """Logits [n, V] of the distributions that are drawn from, -inf at what is not allowed. fp32."""
    logits = logits.float()
    free = [i for i, allowed in enumerate(choices) if allowed is None]
    if len(free) == len(choices):
        return _processed(logits, sampling, contexts)
    scores = torch.full_like(logits, -torch.inf)
    if free:
        scores[free] = _processed(logits[free], sampling, [contexts[i] for i in free] if contexts else [])
    for i, allowed in enumerate(choices):
        if allowed is not None:
            scores[i, list(allowed)] = logits[i, list(allowed)] / (sampling.temperature or 1.0)
    return scores


def _processed(logits: Tensor, sampling: Sampling, contexts: Sequence[Sequence[int]]) -> Tensor:
    steps = LogitsProcessorList()  # in the order of transformers' own `generate`
    seen = torch.empty(0)
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        width = max(map(len, contexts))
        # A repeated id is penalised once: padding with the row's own first id changes nothing.
        padded = [[*ids, *[ids[0]] * (width - len(ids))] for ids in contexts]
        seen = torch.tensor(padded, device=logits.device)
    if sampling.temperature not in (0, 1.0):
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(seen, logits)


def uniforms(seed: str) -> random.Random:
    """The row's own numbers for one turn, named by (run, step, row, sample, turn) and not by what was drawn before."""
    return random.Random(seed)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """A turn as the world, the rewards and the tables read it: without special tokens, nothing tidied up."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Stops:
    """Whether a turn's text holds a stop string, looked up when a token could have completed one."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._last = {text[-1] for text in stop} | {"\ufffd"}  # a character may be spread over tokens
        self._window = max((len(text.encode()) for text in stop), default=0) + 4
        self._may_end: dict[int, bool] = {}

    def ended(self, ids: Sequence[int]) -> bool:
        """Did the last of these tokens complete a stop string?"""
        if not self._stop or not ids:
            return False
        last = ids[-1]
        if last not in self._may_end:
            self._may_end[last] = any(c in self._last for c in text_of(self._tokenizer, [last]))
        if not self._may_end[last]:
            return False
        text = text_of(self._tokenizer, ids[-self._window :])
        return any(stop in text for stop in self._stop)
