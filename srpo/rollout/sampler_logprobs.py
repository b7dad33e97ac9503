"""Log-probs of the completions under the pass that sampled them, mu_old, and how far the trainer's are from them.

vLLM and `srpo.rollout.generator` report them. `model.generate` of transformers does not, so that they are read here
from the logits of its forward passes, at the sampling temperature and before any top-k, top-p or min-p: comparable
with the trainer's, which knows no such cut either.

    k1 = log mu - log pi        k3 = exp(log pi - log mu) - 1 - (log pi - log mu)        both estimate D_KL[mu || pi]
    F(tau) = share of the tokens with max(pi/mu, mu/pi) > tau

Source of k1: arXiv:2512.01374; of F: arXiv:2510.11370. The mean of k1 over few tokens may well be negative; k3 is not.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers.utils import logging

from srpo.replay.fed_tokens import FedTokens
from srpo.rollout.kv_cache import given_cache
from srpo.rollout.sampling_rules import own_settings_aside, unscored_settings
from srpo.rollout.special_tokens import settle_special_tokens

logger = logging.get_logger(__name__)

OUTSIDE = (1.05, 2.0)


class SampledLogProbs:
    """Reads the log-probs of the sampled tokens while `model.generate` runs inside this context. Single use.

    With and without a KV cache, and with a prefill in several passes (`srpo.replay.fed_tokens`).

    Args:
        width: columns of the prompts; each column after them is a token that was drawn from the logits before it.
    """

    def __init__(self, model: torch.nn.Module, temperature: float, width: int):
        self._temperature = temperature
        self._width = width
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
        drawn = min(self._fed.new, self._fed.columns - self._width)
        if drawn > 0:
            if self._fed.new > 1:
                raise RuntimeError(f"assisted decoding fed {self._fed.new} tokens at once: sample unassisted")
            self._steps.append(self._gather(ids[:, -1]))

    def _after(self, _module: torch.nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._last = torch.log_softmax(output.logits[:, -1].float() / self._temperature, dim=-1)

    def _gather(self, ids: Tensor) -> Tensor:
        assert self._last is not None
        return self._last.gather(-1, ids.to(self._last.device).unsqueeze(-1)).squeeze(-1)


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


class SamplerMixin:
    """Sampler log-probs for `SRPOTrainer` where something reads them, and their distance to pi_old.

    Logged per generation batch as `sampling/...`, over all ranks, wherever both log-probs exist.
    """

    accelerator: Any
    args: Any
    model: Any
    pad_to_multiple_of: int | None
    temperature: float
    eos_token_ids: list[int]
    max_completion_length: int
    use_vllm: bool
    vllm_generation: Any
    vllm_mode: str
    generation_config: Any
    generation_kwargs: dict[str, Any]
    _metrics: Any
    _tokenizer: Any

    def _set_up_sampling(self) -> None:
        """After TRL's engines exist: what ends a completion is the same for each, and what is not scored is said."""
        self.eos_token_ids = settle_special_tokens(self.model, self._tokenizer)
        pad = self._tokenizer.pad_token_id
        self.model.config.get_text_config().pad_token_id = self.model.generation_config.pad_token_id = pad
        if unscored := unscored_settings(self.args):
            logger.warning(
                "%s: completions are sampled from a part of the policy's distribution, and scored, as in TRL, under "
                "the whole of it at this temperature. Leave these out for log-probs of what was sampled",
                ", ".join(unscored),
            )
        if not self.use_vllm:
            ids = {"eos_token_id": self.eos_token_ids, "pad_token_id": pad}
            self.generation_kwargs.update(ids)
            self.generation_config.update(**ids)
            return
        # vLLM reads the end tokens of the *path*, and none at all with `--generation-config vllm`: they do not count.
        engine = self.vllm_generation
        ends = {"stop_token_ids": list(self.eos_token_ids), "ignore_eos": True}
        engine.generation_kwargs = {**(engine.generation_kwargs or {}), **ends}
        cap = self.model.generation_config.max_new_tokens
        if self.vllm_mode == "server" and cap is not None and cap < self.max_completion_length:
            logger.warning(
                "The policy's generation_config says max_new_tokens=%d: a vLLM server cuts every completion there, "
                "unless it was started with `--generation-config vllm`",
                cap,
            )

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        with own_settings_aside(policy):
            return self._generate_here(policy, prompt_ids, *args, **kwargs)

    def _generate_here(self, policy: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        wanted = self.args.loss_type == "minirl" or self.args.routing_replay != "off"
        packed = self.args.use_transformers_continuous_batching
        if not wanted or packed or not self.model.training:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        policy = policy.get_base_model() if is_peft_model(policy) else policy  # whose own `generate` PEFT calls
        width = prompt_width(prompt_ids, self.pad_to_multiple_of)
        with SampledLogProbs(policy, self.temperature, width) as sampled:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return completion_ids, sampled.of(completion_ids) if logprobs is None else logprobs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if {"sampling_per_token_logps", "old_per_token_logps"} <= batch.keys():
            mask = batch["completion_mask"] * batch.get("tool_mask", 1)
            sums = mismatch_sums(batch["sampling_per_token_logps"], batch["old_per_token_logps"], mask)
            mode = "train" if self.model.training else "eval"
            sums = self.accelerator.reduce(sums, reduction="sum")
            for name, value in mismatch_metrics(sums).items():
                self._metrics[mode][f"sampling/{name}"].append(value)
        return batch
