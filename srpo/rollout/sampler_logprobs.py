"""Log-probs of the completions under the pass that sampled them, mu_old, and how far the trainer's are from them.

vLLM and `srpo.rollout.generator` report them. `model.generate` of transformers does not, so that they are read here
from the logits of its forward passes, at the sampling temperature and before any top-k, top-p or min-p: comparable
with the trainer's, which knows no such cut either.

    k1 = log mu - log pi        k3 = exp(log pi - log mu) - 1 - (log pi - log mu)        both estimate D_KL[mu || pi]
    F(tau) = share of the tokens with max(pi/mu, mu/pi) > tau

Source of k1: arXiv:2512.01374; of F: arXiv:2510.11370. The mean of k1 over few tokens may well be negative; k3 is not.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from srpo.replay.fed_tokens import FedTokens
from srpo.rollout.kv_cache import given_cache
from srpo.rollout.sampling_rules import unscored_settings
from srpo.rollout.special_tokens import settle_special_tokens

logger = logging.get_logger(__name__)

OUTSIDE = (1.05, 2.0)


class SampledLogProbs:
    """Reads the log-probs of the sampled tokens while `model.generate` runs inside this context. Single use.

    With and without a KV cache, and with a prefill in several passes (`srpo.replay.fed_tokens`).

    Args:
        width: columns of the prompts; each column after them is a token that was drawn from the logits before it.
        masked: (columns so far [B, S], logits [B, V]) -> logits of what was allowed; None: everything was.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        temperature: float,
        width: int,
        masked: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self._temperature = temperature
        self._width = width
        self._masked = masked
        self._columns: Tensor | None = None  # [B, S] that `masked` reads
        self._fed = FedTokens()
        self._steps: list[Tensor] = []  # [B] each: the tokens that were fed back
        self._last: Tensor | None = None  # [B, V] log-probs after the last forward
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def __enter__(self) -> "SampledLogProbs":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def of(self, completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Per completion its tokens' log-probs, nats; `completion_ids` as sampled, each cut after its end token.

        Raises:
            RuntimeError: other tokens than these went through the model.
        """
        self._fed.check(self._width, completion_ids)
        longest = max(map(len, completion_ids))
        steps = list(self._steps)
        if len(steps) < longest:  # the last token was sampled, but never fed
            tail = [ids[-1] if len(ids) == longest else 0 for ids in completion_ids]
            steps.append(self._gather(torch.tensor(tail)))
        table = torch.stack(steps[:longest], dim=1).tolist()
        return [row[: len(ids)] for row, ids in zip(table, completion_ids, strict=True)]

    def _before(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise RuntimeError("the log-probs of a policy that is fed embeddings (virtual tokens) cannot be recorded")
        self._fed.feed(ids, cached=given_cache(kwargs) is not None)
        if self._masked is not None:
            cached = self._columns is not None and given_cache(kwargs) is not None
            self._columns = torch.cat([self._columns, ids], dim=1) if cached else ids  # type: ignore[list-item]
        drawn = min(self._fed.new, self._fed.columns - self._width)
        if drawn > 0:
            if self._fed.new > 1:
                raise RuntimeError(f"assisted decoding fed {self._fed.new} tokens at once: sample unassisted")
            self._steps.append(self._gather(ids[:, -1]))

    def _after(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        logits = output.logits[:, -1].float()
        if self._masked is not None:
            assert self._columns is not None
            logits = self._masked(self._columns, logits)
        self._last = torch.log_softmax(logits / self._temperature, dim=-1)

    def _gather(self, ids: Tensor) -> Tensor:
        assert self._last is not None
        return self._last.gather(-1, ids.to(self._last.device).unsqueeze(-1)).squeeze(-1)


def sampled_with_logps(
    sample: Callable[[], tuple[Any, Any]],
    model: torch.nn.Module,
    temperature: float,
    width: int,
    masked: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Any, Any]:
    """What `sample` returns, completions and log-probs, with those of `SampledLogProbs` where it has none."""
    with SampledLogProbs(model, temperature, width, masked) as sampled:
        completion_ids, logprobs = sample()
    return completion_ids, sampled.of(completion_ids) if logprobs is None else logprobs


def prompt_width(prompt_ids: Sequence[Sequence[int]], multiple: int | None) -> int:
    """Columns of the prompts as TRL pads them for `generate`: the longest one, rounded up to `multiple`."""
    longest = max(map(len, prompt_ids))
    return -(-longest // multiple) * multiple if multiple else longest


def mismatch_sums(sampler_logp: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """Sums over the tokens of `mask` [B,T] that the sampler scored: [count, k1, k3, |difference|, F(1.05), F(2)].

    They add up over micro-batches and ranks; `mismatch_metrics` divides them.
    """
    difference = (logp - sampler_logp)[mask.bool() & ~torch.isnan(sampler_logp)].double()
    columns = [torch.ones_like(difference), -difference, torch.expm1(difference) - difference, difference.abs()]
    columns += [(difference.abs() > torch.tensor(tau).log()).double() for tau in OUTSIDE]
    return torch.stack(columns).sum(dim=1)


def mismatch_metrics(sums: Tensor) -> dict[str, float]:
    """Means of `mismatch_sums`, under the names they are logged with; nothing where no token was scored."""
    count, *totals = sums.tolist()
    names = ("kl_k1", "kl_k3", "logp_difference", *(f"outside_{tau}" for tau in OUTSIDE))
    return {name: total / count for name, total in zip(names, totals, strict=True)} if count else {}


def settle_ends(model: Any, tokenizer: Any, args: Any, generation_config: Any, engine: Any) -> list[int]:
    """What ends a completion is the same for every way to sample, and what is not scored is said.

    Args:
        model: the policy; it and its configurations get the ids.
        generation_config: TRL's, where transformers sample.
        engine: TRL's vLLM, or None.

    Returns:
        Ids of which any one ends a completion.
    """
    ends = settle_special_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = model.generation_config.pad_token_id = pad
    if unscored := unscored_settings(args):
        logger.warning(
            "%s: completions are sampled from a part of the policy's distribution, and scored, as in TRL, under "
            "the whole of it at this temperature. Leave these out for log-probs of what was sampled",
            ", ".join(unscored),
        )
    if engine is None:
        generation_config.update(eos_token_id=ends, pad_token_id=pad)
        return ends
    # vLLM reads the end tokens of the *path*, and none at all with `--generation-config vllm`: they do not count.
    engine.generation_kwargs = {**(engine.generation_kwargs or {}), "stop_token_ids": list(ends), "ignore_eos": True}
    cap = model.generation_config.max_new_tokens
    if args.vllm_mode == "server" and cap is not None and cap < args.max_completion_length:
        logger.warning(
            "The policy's generation_config says max_new_tokens=%d: a vLLM server cuts every completion there, "
            "unless it was started with `--generation-config vllm`",
            cap,
        )
    return ends


def batch_mismatch(batch: dict[str, Any], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """`mismatch_metrics` of a generation batch that has both log-probs; `reduce` sums over ranks."""
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    sums = mismatch_sums(batch["sampling_per_token_logps"], batch["old_per_token_logps"], mask)
    return {f"sampling/{name}": value for name, value in mismatch_metrics(reduce(sums)).items()}
