"""Routing replay in the trainer: which pass records experts, which replays them, and which never does.

    pass                                        off      R2       R3
    rollout                                     native   native   recorded (here, or returned by the engine)
    old log-probs (the weights that sampled)    native   recorded replayed
    policy forward, every update and epoch      native   replayed replayed
    its checkpoint re-forward, in backward      native   same     same
    reference, teacher, evaluation, adapter off native   native   native

Source: arXiv:2512.01374, Table 1. `srpo.replay.replay` does it on the model; `srpo.replay.settings` chooses the mode.

The batch carries `routed_experts` [B, S, L, k] int16 on the CPU, in the padding of prompt and completion; it is
shuffled, split and saved with a generation batch like any other tensor. -1 = route natively: pads, the last token, and
whatever was never fed to the sampler. Rows of several turns are appended and never rewritten: each token keeps the
experts of the forward that produced its log-prob. The penalty to a reference policy is therefore not 0 at step 0.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from srpo.replay import metrics as replay_metrics
from srpo.replay.expert_table import cut_routes, pad_routes
from srpo.replay.replay import RoutingReplay
from srpo.replay.settings import Mode, check_replay, has_old_logprobs, replay_mode
from srpo.replay.vllm import EngineRoutes, returning_routes
from srpo.rollout.sampler_logprobs import prompt_width

logger = logging.get_logger(__name__)

ROUTES = "routed_experts"


class ReplayMixin:
    """The pass table above, for `srpo.trainer.trainer.SRPOTrainer`; it stands before all mixins that score or sample.

    Attributes:
        routing_replay: the mode of this run: off, R2 or R3.
        replay: the hooks on the policy's routers; None with off.
    """

    accelerator: Any
    args: Any
    current_gradient_accumulation_steps: int
    environment: Any
    model: Any
    pad_to_multiple_of: int | None
    state: Any
    use_vllm: bool
    vllm_generation: Any
    _is_vlm: bool
    _metrics: Any
    _recorder: Any = None
    _step: int
    _trajectories: Any

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        mode = replay_mode(args)
        if mode != "off" and args.router_aux_loss_coef is None:
            args.router_aux_loss_coef = 0.0  # TRL's default is the model's own coefficient
        self.routing_replay: Mode = "off"
        self.replay: RoutingReplay | None = None
        self._rows: Sequence[Tensor] | None = None  # R3: routes of the batch that is being scored, ragged
        self._routes: Tensor | None = None  # the same in the padding of the batch
        self._old_pass_due = False
        with returning_routes() if mode == "R3" and args.use_vllm else nullcontext():
            super().__init__(model, reward_funcs, args, *rest, **kwargs)  # type: ignore[call-arg]
        if mode != "off":
            check_replay(args)  # TRL forces reentrant checkpointing on LoRA with ZeRO-3
            self._install(mode)
        elif args.routing_replay == "R2":
            logger.warning("routing_replay: R2 has no effect with one optimiser step per rollout, and is off")

    def _install(self, mode: Mode) -> None:
        if self._is_vlm or getattr(self, "tools", None):
            raise ValueError("routing_replay supports text policies without tools=; set routing_replay: off")
        try:
            self.replay = RoutingReplay(self.model)
        except ValueError as error:
            if self.args.routing_replay != "auto":
                raise
            logger.warning("routing_replay: auto is off. %s", error)
            return
        self.routing_replay = mode
        if mode == "R3" and self.use_vllm:
            self._engine_routes = EngineRoutes(self.vllm_generation, self.replay.spec)
        _refuse_jitter(self.model.config.get_text_config())
        self.replay_alarms = replay_metrics.ReplayAlarms(logger.warning)

    # ------------------------------------------------------------------------------------------------- sampling

    def _generate(self, prompts: list[Any]) -> Any:
        self._rows = self._routes = None
        self._old_pass_due = self.replay is not None and self.model.training and has_old_logprobs(self.args)
        if self.routing_replay != "R3" or not self.model.training:
            return super()._generate(prompts)
        with self._recorded_turns() as recorder:
            output = super()._generate(prompts)
        prompt_ids, completion_ids, extra_fields = output[0], output[1], output[5]
        if recorder is not None:
            lengths = {i: len(p) + len(c) for i, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True))}
            self._rows = self._rows_of_turns(recorder, lengths)
        elif ROUTES in extra_fields:  # a rollout function that asked an engine (srpo.replay.engines)
            self._rows = [torch.as_tensor(row, dtype=torch.int16) for row in extra_fields.pop(ROUTES)]
        if self._rows is None:
            raise ValueError(
                f"routing_replay: R3, but the rollout function returned no {ROUTES!r}: give one array [tokens of "
                "prompt and completion, layers, k] per completion (srpo.replay.engines), or set routing_replay: R2"
            )
        return output

    @contextmanager
    def _recorded_turns(self) -> Iterator[Any]:
        """Inside, the decoding loop of an environment reports its forwards; yields None without an environment."""
        if getattr(self, "environment", None) is None:
            yield None
            return
        assert self.replay is not None
        if self.use_vllm:
            raise ValueError(
                "routing_replay: R3 does not read vLLM's experts over several turns; sample with transformers "
                "(use_vllm: false) or set routing_replay: R2"
            )
        with self.replay.record_rows() as recorder:
            self._recorder = recorder
            try:
                yield recorder
            finally:
                self._recorder = None

    def _rows_of_turns(self, recorder: Any, lengths: dict[int, int]) -> list[Tensor]:
        # A lost trajectory may have been fed more than it kept, or nothing; none of its tokens is trained on.
        assert self.replay is not None
        lost = {i for i, one in enumerate(self._trajectories) if one.stop == "lost"}
        kept = {i: n for i, n in lengths.items() if i not in lost}
        rows = dict(zip(kept, recorder.rows(kept) if kept else [], strict=True))
        shape = (len(self.replay.spec.layers), self.replay.spec.top_k)
        return [rows[i] if i in rows else torch.full((n, *shape), -1, dtype=torch.int16) for i, n in lengths.items()]

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.routing_replay != "R3" or not self.model.training:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        assert self.replay is not None
        if self.use_vllm:
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            self._rows = self._engine_routes.rows(prompt_ids, completion_ids)
            return completion_ids, logprobs
        with self.replay.record():
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.replay.check_fed(prompt_width(prompt_ids, self.pad_to_multiple_of), completion_ids)
        mask = generation_mask(prompt_ids, completion_ids, self.pad_to_multiple_of)
        self._rows = cut_routes(self.replay.recorded(), mask)
        return completion_ids, logprobs

    # -------------------------------------------------------------------------------------------------- scoring

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.replay is not None and self.model.training:
            if self._routes is None:  # R3 without a pass over the old policy
                self._routes = self._lay_out(torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1))
            batch[ROUTES] = self._routes
        return batch

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # TRL scores the old policy first, where it does at all; what follows is the reference, also as the policy's
        # own model without its adapter.
        due, self._old_pass_due = self._old_pass_due, False
        if not due:
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        recorded: list[Tensor] = []
        if self.routing_replay == "R3":
            self._routes = self._lay_out(attention_mask)
        with self._every_forward(model, self._routes, recorded):
            scored = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)
        if self.routing_replay == "R2":
            self._routes = torch.cat(recorded).masked_fill(attention_mask.cpu()[:, :, None, None] == 0, -1)
        return scored

    def _lay_out(self, attention_mask: Tensor) -> Tensor:
        assert self._rows is not None
        # Fewer tokens than rows where truncated completions are masked: their prompt is all that is left to attend to.
        tokens = attention_mask.sum(dim=1).tolist()
        return pad_routes([row[:n] for row, n in zip(self._rows, tokens, strict=True)], attention_mask.cpu())

    @contextmanager
    def _every_forward(self, model: Any, routes: Tensor | None, recorded: list[Tensor]) -> Iterator[None]:
        """Forwards inside take consecutive rows of a batch; they replay `routes`, or without them are `recorded`."""
        replay, start = self.replay, 0
        context: Any = None
        assert replay is not None

        def before(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal start, context
            rows = kwargs["input_ids"].size(0)
            context = replay.record_once() if routes is None else replay.replay(routes[start : start + rows])
            start += rows
            context.__enter__()

        def after(_module: Any, _args: Any, output: Any) -> None:
            context.__exit__(None, None, None)
            if routes is None and output is not None:
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

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.replay is None or ROUTES not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if self._audit_due():
            replay_metrics.log_audit(self, inputs)
        self.replay.arm(inputs[ROUTES])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(*args, **kwargs)
        finally:
            if self.replay is not None:
                self.replay.disarm()  # only now: the backward pass may run layers again

    def _audit_due(self) -> bool:
        every = self.args.routing_replay_metrics_steps
        first = self._step % self.current_gradient_accumulation_steps == 0
        return every > 0 and first and self.state.global_step % every == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.replay is not None and self.model.training:
            self.replay_alarms.observe({name: v for name, v in logs.items() if isinstance(v, float)})


def generation_mask(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], multiple: int | None
) -> Tensor:
    """[B, W + C]: the real tokens in the columns of `generate`, prompts on the left of W and completions on its right.

    `multiple`: TRL pads prompts to a multiple of it.
    """
    width, longest = prompt_width(prompt_ids, multiple), max(map(len, completion_ids))
    mask = torch.zeros(len(prompt_ids), width + longest, dtype=torch.bool)
    for row, prompt, completion in zip(mask, prompt_ids, completion_ids, strict=True):
        row[width - len(prompt) : width + len(completion)] = True
    return mask


def _refuse_jitter(config: Any) -> None:
    for name in ("router_jitter_noise", "input_jitter_noise"):
        if getattr(config, name, 0.0):
            raise ValueError(
                f"routing_replay: the model's {name} is {getattr(config, name)}: noise in training mode changes the "
                "choice that is recorded; set it to 0 in the model's configuration"
            )
