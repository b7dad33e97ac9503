"""What the setting `routing_replay` means for a run, from its arguments alone, and which arguments it refuses."""

from typing import Any, Literal

Mode = Literal["off", "R2", "R3"]
REPLAY_MODES = ("off", "R2", "R3", "auto")


def updates_per_rollout(args: Any) -> float:
    """Optimiser steps that one generation batch feeds; below 1 where one step takes several batches."""
    return float(args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps)


def has_old_logprobs(args: Any) -> bool:
    """Whether TRL scores the rollouts before it trains on them: not where the first update uses up the batch."""
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    return corrected or args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0


def replay_mode(args: Any) -> Mode:
    """The mode of a mixture-of-experts policy: "auto" follows arXiv:2512.01374, section 5.

    One update per rollout: "off" with importance correction of the sampler; without it "R3", as in arXiv:2510.11370
    (INFERRED: the papers disagree about one update, and differ in that correction). Two: "R2". More: "R3".
    "R2" without a pass that records (no old log-probs, so one update per rollout) is "off".
    """
    mode: Mode = args.routing_replay
    if args.routing_replay == "auto":
        updates = updates_per_rollout(args)
        corrected = args.loss_type == "minirl" or (args.use_vllm and args.vllm_importance_sampling_correction)
        if updates <= 1:
            return "off" if corrected else "R3"
        mode = "R2" if updates <= 2 else "R3"
    return "off" if mode == "R2" and not has_old_logprobs(args) else mode


def check_replay(args: Any) -> None:
    """Raise ValueError for arguments that contradict replay; the model is looked at later, by `RoutingReplay`."""
    mode = replay_mode(args)
    if mode == "off":
        return
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "routing_replay: reentrant checkpointing may silently recompute with other experts; set "
            "gradient_checkpointing_kwargs: {use_reentrant: false} or gradient_checkpointing: false"
        )
    if mode == "R3" and args.use_vllm and args.vllm_mode != "colocate":
        raise ValueError(
            f"routing_replay: R3 needs the experts that the engine chose, and TRL's vLLM server (vllm_mode: "
            f"{args.vllm_mode}) does not return them; set vllm_mode: colocate or routing_replay: R2"
        )
    if mode == "R3" and args.use_transformers_continuous_batching:
        raise ValueError(
            "routing_replay: R3 cannot record the packed rows of continuous batching; set "
            "use_transformers_continuous_batching: false or routing_replay: R2"
        )
