"""Log-probs of the completions under the pass that sampled them, mu_old, and how far the trainer's are from them.

Our generator reports them as the trainer scores, without top-k, top-p and min-p (`srpo.rollout.generator.draw`): what
is left between the two is what they compute differently. vLLM's (`processed_logprobs`, which TRL demands; its raw ones
know no temperature) are under what the cuts left: with a cut, pi/mu is then the mass that was kept.

    k1 = log mu - log pi        k3 = exp(log pi - log mu) - 1 - (log pi - log mu)        both estimate D_KL[mu || pi]
    F(tau) = share of the tokens with max(pi/mu, mu/pi) > tau

Source of k1: arXiv:2512.01374; of F: arXiv:2510.11370. The mean of k1 over few tokens may well be negative; k3 is not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from srpo.rollout.sampling_rules import unscored_settings
from srpo.rollout.special_tokens import settle_special_tokens

logger = logging.get_logger(__name__)

OUTSIDE = (1.05, 2.0)


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


def settle_ends(trainer: Any, engine: Any) -> list[int]:
    """What ends a completion is the same for every way to sample, and what is not scored is said.

    Args:
        trainer: its policy, the policy's configurations and TRL's settings of generation get the ids.
        engine: TRL's vLLM, or None.

    Returns:
        Ids of which any one ends a completion.
    """
    model, args = trainer.model, trainer.args
    ends = settle_special_tokens(model, trainer._tokenizer)
    pad = trainer._tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = model.generation_config.pad_token_id = pad
    if unscored := unscored_settings(args):
        logger.warning(
            "%s: completions are sampled from a part of the policy's distribution, and scored, as in TRL, under "
            "the whole of it at this temperature. Leave these out for log-probs of what was sampled",
            ", ".join(unscored),
        )
    if engine is None:
        for settings in (trainer.generation_config, trainer.generation_kwargs):
            settings.update(eos_token_id=ends, pad_token_id=pad)
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
