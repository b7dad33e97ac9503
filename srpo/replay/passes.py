"""Routing replay in the trainer: which pass records experts, which replays them, and which never does.

    pass                                        off      R2       R3
    rollout                                     native   native   recorded (here, or returned by the engine)
    old log-probs (the weights that sampled)    native   recorded replayed
    policy forward, every update and epoch      native   replayed replayed
    its checkpoint re-forward, in backward      native   same     same
    reference, teacher, evaluation, adapter off native   native   native

Source: arXiv:2512.01374, Table 1. `srpo.replay.replay` does it on the model; `srpo.replay.settings` chooses the mode.

The batch carries `expert_ids` [B, S, L, k] int16 on the CPU, in the padding of prompt and completion; it is
shuffled, split and saved with a generation batch like any other tensor. -1 = route natively: pads, the last token, and
whatever was never fed to the sampler. Rows of several turns are appended and never rewritten: each token keeps the
experts of the forward that produced its log-prob. The penalty to a reference policy is therefore not 0 at step 0.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging

from srpo.replay.expert_table import pad_routes
from srpo.replay.metrics import ReplayAlarms, audited
from srpo.replay.replay import RoutingReplay
from srpo.replay.settings import Mode, check_replay, has_old_logprobs, replay_mode
from srpo.replay.vllm import EngineRoutes, returning_routes
from srpo.trainer.generation_step import GenerationStep

logger = logging.get_logger(__name__)

EXPERT_IDS = "expert_ids"
"""Key of a batch, and of the extra fields of a rollout function."""


def engine_that_replay_needs(args: Any) -> AbstractContextManager[None]:
    """Around the constructor of TRL's trainer; sets what TRL would otherwise take from the model."""
    mode = replay_mode(args)
    if mode != "off" and args.router_aux_loss_coef is None:
        args.router_aux_loss_coef = 0.0  # TRL's default is the model's own coefficient
    return returning_routes() if mode == "R3" and args.use_vllm else nullcontext()


def replay_passes(model: Any, args: Any, refused: bool, engine: Any) -> "ReplayPasses | None":
    """Those of a run; None where it replays nothing.

    Args:
        model: the policy, after PEFT has wrapped it.
        args: the configuration.
        refused: the policy is one of text and pictures, or has `tools=`.
        engine: TRL's vLLM, or None.

    Raises:
        ValueError: settings, or a model, that replay cannot work with.
    """
    mode = replay_mode(args)
    if mode == "off":
        if args.routing_replay == "R2":
            logger.warning("routing_replay: R2 has no effect with one optimiser step per rollout, and is off")
        return None
    check_replay(args)  # TRL forces reentrant checkpointing on LoRA with ZeRO-3
    if refused:
        raise ValueError("routing_replay supports text policies without tools=; set routing_replay: off")
    try:
        replay = RoutingReplay(model)
    except ValueError as error:
        if args.routing_replay != "auto":
            raise
        logger.warning("routing_replay: auto is off. %s", error)
        return None
    _refuse_jitter(model.config.get_text_config())
    return ReplayPasses(replay, mode, args, engine)


class ReplayPasses:
    """The pass table above.

    Attributes:
        mode: of this run: R2 or R3.
        replay: the hooks on the policy's routers.
    """

    def __init__(self, replay: RoutingReplay, mode: Mode, args: Any, engine: Any) -> None:
        self.replay, self.mode, self.args = replay, mode, args
        self._engine = EngineRoutes(engine, replay.spec) if mode == "R3" and engine is not None else None
        self.alarms = ReplayAlarms(logger.warning)

    def _samples(self, step: GenerationStep) -> bool:
        """Whether the rollout of this step is recorded."""
        return self.mode == "R3" and step.training

    # ------------------------------------------------------------------------------------------------- sampling

    @contextmanager
    def turns(self, step: GenerationStep) -> Iterator[None]:
        """Around the episodes of an environment: `step` has the recorder that its decoding loop reports to."""
        if not self._samples(step):
            yield
            return
        if self._engine is not None:
            raise ValueError(
                "routing_replay: R3 does not read vLLM's experts over several turns; sample with transformers "
                "(use_vllm: false) or set routing_replay: R2"
            )
        with self.replay.record_rows() as step.recorder:
            yield

    def take(self, step: GenerationStep, output: tuple[Any, ...]) -> None:
        """Keep what `turns` recorded, or a rollout function has returned; `output` is that of TRL's `_generate`."""
        step.old_pass_due = step.training and has_old_logprobs(self.args)
        if not self._samples(step):
            return
        prompt_ids, completion_ids, extra_fields = output[0], output[1], output[5]
        if step.trajectories is not None:
            lengths = {i: len(p) + len(c) for i, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True))}
            # A lost trajectory may have been fed more than it kept, or nothing; none of its tokens is trained on.
            lost = {i for i, one in enumerate(step.trajectories) if one.stop == "lost"}
            kept = {i: n for i, n in lengths.items() if i not in lost}
            rows = dict(zip(kept, step.recorder.rows(kept) if kept else [], strict=True))
            shape = (len(self.replay.spec.layers), self.replay.spec.top_k)
            step.recorder = None
            step.expert_rows = [
                rows[i] if i in rows else torch.full((n, *shape), -1, dtype=torch.int16) for i, n in lengths.items()
            ]
        elif EXPERT_IDS in extra_fields:  # a rollout function that asked an engine (srpo.replay.engines)
            step.expert_rows = [torch.as_tensor(row, dtype=torch.int16) for row in extra_fields.pop(EXPERT_IDS)]
        if step.expert_rows is None:
            raise ValueError(
                f"routing_replay: R3, but the rollout function returned no {EXPERT_IDS!r}: give one array [tokens of "
                "prompt and completion, layers, k] per completion (srpo.replay.engines), or set routing_replay: R2"
            )

    @contextmanager
    def sampling(self, step: GenerationStep) -> Iterator[None]:
        """Around the sampling of completions of one turn: `step` has the recorder that the generator reports to."""
        if not self._samples(step) or self._engine is not None:
            yield
            return
        with self.replay.record_rows() as step.recorder:
            yield

    def sampled(self, step: GenerationStep, prompt_ids: Any, completion_ids: Any) -> None:
        """After TRL's `_generate_single_turn`: keep the expert ids of these completions."""
        if not self._samples(step):
            return
        if self._engine is not None:
            step.expert_rows = self._engine.rows(prompt_ids, completion_ids)
            return
        pairs = enumerate(zip(prompt_ids, completion_ids, strict=True))
        step.expert_rows = step.recorder.rows({i: len(prompt) + len(completion) for i, (prompt, completion) in pairs})
        step.recorder = None

    # -------------------------------------------------------------------------------------------------- scoring

    @contextmanager
    def old_pass(self, step: GenerationStep, model: Any, attention_mask: Tensor) -> Iterator[None]:
        """Around a scoring pass of a batch with `attention_mask` [B, S].

        TRL scores the old policy first, where it does at all; what follows is the reference, also as the policy's own
        model without its adapter.
        """
        due, step.old_pass_due = step.old_pass_due, False
        if not due:
            yield
            return
        recorded: list[Tensor] = []
        if self.mode == "R3":
            step.expert_ids = laid_out(step, attention_mask)
        with self._every_forward(model, step.expert_ids, recorded):
            yield
        if self.mode == "R2":
            step.expert_ids = torch.cat(recorded).masked_fill(attention_mask.cpu()[:, :, None, None] == 0, -1)

    def batch(self, step: GenerationStep, batch: dict[str, Any]) -> dict[str, Any]:
        """What a scored generation batch has to carry along."""
        if not step.training:
            return {}
        if step.expert_ids is None:  # R3 without a pass over the old policy
            step.expert_ids = laid_out(step, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1))
        return {EXPERT_IDS: step.expert_ids}

    @contextmanager
    def _every_forward(self, model: Any, expert_ids: Tensor | None, recorded: list[Tensor]) -> Iterator[None]:
        """Forwards inside take consecutive rows of a batch; they replay `expert_ids`, or are `recorded`."""
        replay, start = self.replay, 0
        context: Any = None

        def before(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal start, context
            rows = kwargs["input_ids"].size(0)
            context = replay.record_once() if expert_ids is None else replay.replay(expert_ids[start : start + rows])
            start += rows
            context.__enter__()

        def after(_module: Any, _args: Any, output: Any) -> None:
            context.__exit__(None, None, None)
            if expert_ids is None and output is not None:
                recorded.append(replay.recorded())

        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # ------------------------------------------------------------------------------------------------- training

    def arm(
        self,
        inputs: dict[str, Any],
        when: tuple[int, int],
        score: Callable[[], Tensor],
        clip: tuple[float, float],
        accelerator: Accelerator,
    ) -> dict[str, float]:
        """Replay a micro-batch, which is audited before where it is time to: the numbers of that (`audited`), or none.

        Args:
            when: optimiser steps made, and micro-batches of the next one.
            score, clip: as in `audited`.
        """
        every, (steps, micro) = self.args.routing_replay_metrics_steps, when
        due = every > 0 and micro == 0 and steps % every == 0
        numbers = audited(score, self.replay, inputs, clip, accelerator) if due else {}
        self.replay.arm(inputs[EXPERT_IDS])
        return numbers


def laid_out(step: GenerationStep, attention_mask: Tensor) -> Tensor:
    """Expert ids of a rollout [B, S, L, k] in the padding of `attention_mask` [B, S]."""
    assert step.expert_rows is not None
    # Fewer tokens than rows where truncated completions are masked: their prompt is all that is left to attend to.
    tokens = attention_mask.sum(dim=1).tolist()
    return pad_routes([row[:n] for row, n in zip(step.expert_rows, tokens, strict=True)], attention_mask.cpu())


def _refuse_jitter(config: Any) -> None:
    for name in ("router_jitter_noise", "input_jitter_noise"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"routing_replay: the model's {name} is {getattr(config, name)}: noise in training mode changes the "
                "choice that is recorded; set it to 0 in the model's configuration"
            )
