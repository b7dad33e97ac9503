"""What replay changes, measured on one micro-batch every n optimiser steps, and alarms in words.

An audit scores one micro-batch twice without gradient, with the current weights: once natively, once replayed.

    router/flip_rate          share of (token, layer) whose native experts differ from the replayed ones; .../layer_N
    router/slot_flip          share of expert slots that differ
    router/token_any_layer    share of tokens with a difference in some layer
    router/fallback_fraction  share of (token, layer) without a recorded choice among the tokens that are fed
    router/replay_bias        mean |log pi_native - log pi_replayed| over the trained tokens
    router/kl_k3_native, router/kl_k3_replay      D_KL[mu_old || pi], where the sampler's log-probs are known
    router/clip_native, router/clip_replay        share of trained tokens that a clip would cut, from the same pi_old

At the weights that sampled, R3 should show at most some 10 % of flips, R2 exactly none; near 100 % means that the
routes belong to other tokens. What is logged at every rollout (`sampling/...`) is in `srpo.rollout.sampler_logprobs`.

Source of the quantities: arXiv:2510.11370, arXiv:2512.01374. The thresholds of the alarms are INFERRED.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from srpo.objectives.grpo import clipped_tokens
from srpo.replay.expert_table import flip_statistics
from srpo.replay.replay import RoutingReplay
from srpo.rollout.sampler_logprobs import mismatch_sums
from srpo.trainer.metrics import Alarms

MISALIGNED = 0.8  # flip rate
FALLBACK = 0.01
OUTSIDE_2 = 1e-3
TREND = 4  # logged values in a row
CLIFF = 0.5  # of the largest entropy among the last few


@torch.no_grad()
def audited(
    score: Callable[[], Tensor],
    replay: RoutingReplay,
    inputs: Mapping[str, Any],
    clip: tuple[float, float],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Audit one micro-batch; the numbers are averaged over ranks, under the names they are logged with.

    Every rank calls it in the same step: the two forwards may be collective.

    Args:
        score: the log-probs [B, T] of the micro-batch, by the trainer's own scoring.
        clip: epsilon_low and epsilon_high.
    """
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    native = score()
    with replay.replay(inputs["expert_ids"], measure=True):
        replayed = score()
    metrics = audit(native, replayed, replay.divergence(), replay.spec, inputs, attention, clip)
    values = torch.tensor(list(metrics.values()), device=attention.device, dtype=torch.float32)
    means = accelerator.gather(values.unsqueeze(0)).nanmean(dim=0).tolist()
    return {f"router/{name}": value for name, value in zip(metrics, means, strict=True)}


def audit(
    native: Tensor,
    replayed: Tensor,
    lost: Tensor,
    spec: Any,
    inputs: Mapping[str, Any],
    attention: Tensor,
    clip: tuple[float, float],
) -> dict[str, float]:
    """The numbers of the module's docstring, NaN where there is nothing to count. Names are the same on all ranks.

    Args:
        native, replayed: [B, T] log-probs of the completions, nats.
        lost: [B, S, L], of `RoutingReplay.divergence`.
        spec: the model's `RouterSpec`.
        inputs: the micro-batch; reads completion_mask, tool_mask, advantages and the stored log-probs.
        attention: [B, S].
        clip: epsilon_low and epsilon_high.
    """
    mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    fed = attention.bool() & mask.any(dim=1, keepdim=True)
    fed[:, :-1] &= attention[:, 1:].bool()
    fed[:, -1] = False  # nothing follows the last token, so nobody asks for its experts
    flips = flip_statistics(lost, spec.top_k, fed)
    metrics = {name: flips[name].item() for name in ("flip_rate", "slot_flip", "token_any_layer", "fallback_fraction")}
    metrics |= {
        f"flip_rate/layer_{layer}": rate for layer, rate in zip(spec.layers, flips["per_layer"].tolist(), strict=True)
    }
    metrics["replay_bias"] = (native - replayed)[mask].abs().mean().item()
    sampled, old = inputs.get("sampling_per_token_logps"), inputs.get("old_per_token_logps")
    for name, logp in (("native", native), ("replay", replayed)):
        if sampled is not None:
            count, _, k3 = mismatch_sums(sampled, logp, mask)[:3].tolist()
            metrics[f"kl_k3_{name}"] = k3 / count if count else math.nan
        if old is not None:
            low, high = clipped_tokens(
                torch.exp(logp - old), inputs["advantages"], epsilon_low=clip[0], epsilon_high=clip[1]
            )
            metrics[f"clip_{name}"] = (low | high)[mask].float().mean().item()
    return metrics


class ReplayAlarms:
    """Says once, in words, that replay or the run around it has gone wrong; fed with what a training step logs."""

    def __init__(self, warn: Callable[[str], None]):
        self._once, self._trend = Alarms(1, warn), Alarms(TREND, warn)
        self._kl: float | None = None
        self._entropies: deque[float] = deque(maxlen=TREND)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """One logged step; a metric that it lacks says nothing."""
        flips, fallback = metrics.get("router/flip_rate"), metrics.get("router/fallback_fraction")
        if flips is not None:
            self._once.observe(
                "misaligned",
                flips > MISALIGNED,
                f"{flips:.0%} of the replayed choices differ from the native ones: the routes are misaligned with "
                "their tokens, or belong to another model. Check that the engine returns one row per token, from the "
                "first prompt token on, and logical expert ids",
            )
        if fallback is not None:
            self._once.observe(
                "fallback",
                fallback > FALLBACK,
                f"{fallback:.1%} of the tokens have no recorded experts and route natively: the rollout lost rows",
            )
        native, replayed = metrics.get("router/kl_k3_native"), metrics.get("router/kl_k3_replay")
        if native is not None and replayed is not None and flips:
            self._trend.observe(
                "no_gain",
                replayed > native,
                f"Replay does not bring the trainer closer to the sampler (k3 {replayed:.2g}, natively {native:.2g}): "
                "the routes may be another version's, or routing is not what differs",
            )
        kl, outside = metrics.get("sampling/kl_k3"), metrics.get("sampling/outside_2.0")
        if kl is not None:
            self._trend.observe(
                "kl_rises",
                self._kl is not None and kl > 1.1 * self._kl,
                f"The mismatch of sampler and trainer keeps rising (k3 {kl:.2g}): collapse usually follows. Lower the "
                "learning rate, sample in a higher precision, or use routing_replay: R3",
            )
            self._kl = kl
        if outside is not None:
            self._trend.observe(
                "outside",
                outside > OUTSIDE_2,
                f"{outside:.2%} of the tokens are twice as probable for the trainer as for the sampler, or half",
            )
        entropy = metrics.get("entropy")
        if entropy is not None:
            before = max(self._entropies, default=entropy)
            self._once.observe(
                "cliff",
                0 < entropy < CLIFF * before,  # 0: no token was trained
                f"The policy's entropy fell off a cliff: from {before:.3g} to {entropy:.3g} in {TREND} logged steps",
            )
            self._entropies.append(entropy)
