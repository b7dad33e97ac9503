"""The trainer core: one training step, told in order, on top of TRL's GRPOTrainer.

    rows -> rollout (TRL) -> world's columns -> rewards (TRL) -> advantages (TRL)
         -> who is distilled -> teacher re-scores those rows -> weights            [_generate_and_score_completions]
         -> one student forward -> objective -> backward                           [_compute_loss]
         -> teacher moves, once per generation batch

`objective="grpo"` runs TRL's own loss untouched. Each hook of TRL's that is overridden here has a test that fails when
TRL moves it (tests/srpo/test_trl_hooks.py).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from srpo.checks import checked_reward, distinct
from srpo.columns import (
    LOST_ROW,
    TABLE_COLUMNS,
    check_dataset_columns,
    check_no_pictures,
    check_reward_names,
    checked_columns,
    without_pictures,
)
from srpo.config import SRPOConfig, as_srpo_config, kept_defaults
from srpo.hub.hub import HubMixin
from srpo.objectives import (
    OBJECTIVES,
    Counts,
    Head,
    LossConfig,
    TokenBatch,
    route,
    sampled_token_divergence,
)
from srpo.objectives.normaliser import per_step
from srpo.replay.passes import ReplayMixin
from srpo.rollout.sampler_logprobs import SamplerMixin
from srpo.rollout.thinking import unfinished
from srpo.rollout.vllm_settings import vllm_of
from srpo.run.steps import StepsMixin
from srpo.teacher.lm_head import Divergence, add_distillation_head
from srpo.teacher.masked_decisions import ChoicesMixin, scored_among
from srpo.teacher.prompt import Rollout, Templates, choose_demonstrations, strip_thinking
from srpo.teacher.teacher import Teacher, unpatched_copy
from srpo.trainer.adapters import prepare_adapter
from srpo.trainer.checkpoint import GenerationClock, ResumeMixin
from srpo.trainer.completions_table import CompletionsMixin
from srpo.trainer.credit import CreditMixin
from srpo.trainer.distiller import DistillationMixin, Plan
from srpo.trainer.engines import gather_when_saving
from srpo.trainer.forward_checks import ForwardChecksMixin
from srpo.trainer.limits import refuse_other_rollouts, refuse_settings_of_episodes
from srpo.trainer.metrics import Alarms, world_metrics
from srpo.trainer.minirl import MiniRLMixin
from srpo.trainer.precision import check_precision, engine_keeps_masters, train_in_fp32
from srpo.trainer.reference import ReferenceMixin
from srpo.trainer.rollouts import RolloutMixin
from srpo.types import FEEDBACK, LOST, Columns, Environment, World

logger = logging.get_logger(__name__)

Correctness = Callable[[Tensor, Columns], Tensor]
"""(rewards [B] summed with their weights, columns) -> correct [B] bool."""


class SRPOTrainer(
    StepsMixin,
    HubMixin,
    ResumeMixin,
    CreditMixin,
    ReplayMixin,
    RolloutMixin,
    ChoicesMixin,
    MiniRLMixin,
    SamplerMixin,
    DistillationMixin,
    CompletionsMixin,
    ForwardChecksMixin,
    ReferenceMixin,
    TRLGRPOTrainer,
):
    """GRPO, SDPO, SRPO and BoPO in one trainer; every argument of `trl.GRPOTrainer`, and four more.

    Args:
        world: called once per batch with (rows, completion texts); its columns reach the reward functions, the
            completions table and the metrics (see `srpo.types`).
        environment: in place of `world`: makes an episode per completion, which policy and world play in turns
            (`srpo.rollout.loop`). Its columns are used like a world's.
        correctness: which completions count as correct, from the summed rewards [B] and the columns. Default: the
            reward reaches `success_reward_threshold`. Truncated completions never count as correct.
        recipe: the resolved recipe, for the model card.

    Raises:
        ValueError: for vision-language models with a distilling objective, and for arguments that contradict.
    """

    _tag_names = ("trl", "srpo")

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        *rest: Any,
        world: World | None = None,
        environment: Environment | None = None,
        correctness: Correctness | None = None,
        recipe: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if args is None:
            args = SRPOConfig(output_dir="srpo-output")
        if not isinstance(args, SRPOConfig):
            args = as_srpo_config(args)
            if kept := kept_defaults(args):
                logger.warning(
                    "args is TRL's own config: %s hold, as it says; SRPOConfig has the papers' defaults for %s",
                    ", ".join(kept),
                    args.objective,
                )
        args.check()
        check_precision(args)
        gather_when_saving(args)
        self.objective = args.objective
        self.recipe = recipe
        self.heldout_table: str | None = None
        self.world = world
        self.correctness = correctness
        self.teacher: Teacher | None = None
        distils = self.objective in OBJECTIVES and (self.objective != "bopo" or args.distill_failed)

        # `rest` are TRL's further arguments by position.
        given = inspect.signature(TRLGRPOTrainer).bind(model, reward_funcs, args, train_dataset, *rest, **kwargs)
        brings_adapter = not isinstance(model, str) and is_peft_model(model)
        has_adapter = brings_adapter or given.arguments.get("peft_config") is not None
        needs_copy = distils and args.teacher_model_kind != "live" and not has_adapter
        if not isinstance(model, str) and not has_adapter:
            train_in_fp32(model, args)  # before it is copied: teacher and reference take the policy's precision
        in_fp32 = args.teacher_model_kind == "ema" or not engine_keeps_masters(args)
        twin = unpatched_copy(model, _init_kwargs(args), in_fp32) if needs_copy else None

        if callable(reward_funcs) and not isinstance(reward_funcs, torch.nn.Module):
            reward_funcs = [reward_funcs]
        if isinstance(reward_funcs, list):
            plain = (str, torch.nn.Module)
            reward_funcs = distinct([f if isinstance(f, plain) else checked_reward(f) for f in reward_funcs])
        for data in datasets_of(given.arguments):
            check_dataset_columns(getattr(data, "column_names", None) or (), environment is not None)
        if environment is not None:
            refuse_other_rollouts(args, given.arguments, world)
        else:
            refuse_settings_of_episodes(args)
        with vllm_of(self, args):
            super().__init__(model, reward_funcs, args, train_dataset, *rest, **kwargs)
        if not self._is_vlm:
            for data in datasets_of(given.arguments):
                check_no_pictures(data)
        train_in_fp32(self.model, args)
        if is_peft_model(self.model):
            prepare_adapter(self.model, self.accelerator)
        self._set_up_sampling()
        check_reward_names(self.reward_func_names)
        if environment is not None:
            self._set_up_rollouts(environment)
            self._add_choice_heads()

        self.alarms = Alarms(args.diagnostics_warning_interval, logger.warning)
        self._columns: Columns = {}
        self._repaired: list[str] = []
        self._rows_here = 0
        self._local_rewards = torch.empty(0)
        self._prompts: list[Any] = []
        self._completion_tokens: list[Any] = []
        self._truncated: list[bool] = []
        self._train_sampler: Any = None
        self.add_callback(GenerationClock(self))
        if self.objective in OBJECTIVES:
            self._set_up_objective(args, distils, twin)
        self._check_forwards()

    def _set_up_objective(self, args: SRPOConfig, distils: bool, twin: PreTrainedModel | None) -> None:
        """What TRL's own loss has no use for: the head with the divergence, the teacher, the constants of the loss."""
        if self._is_vlm:
            raise ValueError(f"objective: {self.objective} trains text models only; use objective: grpo")
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_distillation_head(base)
        if distils:
            self.teacher = Teacher(
                args.teacher_model_kind,
                self.model,
                twin,
                args.teacher_update_rate,
                self.accelerator,
                snapshot_head=self._generate_every > args.gradient_accumulation_steps,
            )
        self._teacher_head: Head | None = None
        self._divergence = Divergence(
            alpha=args.distillation_alpha,
            top_k=args.distillation_topk if args.distillation_mode == "topk_logits" else None,
            tail=args.distillation_add_tail,
            temperature=self.temperature,
        )
        self._loss_config = LossConfig(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta,
            level=self.importance_sampling_level,
            beta=self.beta,
            correct_kl=args.use_bias_correction_kl,
            is_clip=args.distillation_is_clip,
            aggregation=args.distillation_aggregation,
        )
        self._templates = Templates(args.reprompt_template, args.solution_template, args.feedback_template)
        self._branch_gradients = torch.zeros(2, device=self.accelerator.device)  # squared norms: distilled, rewarded

    # ------------------------------------------------------------------------------------------------ rewards

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        self._rows_here = len(texts)
        self._opened = self._opened or [""] * len(texts)
        self._columns, self._repaired = checked_columns(
            self._world_columns(inputs, [o + t for o, t in zip(self._opened, texts, strict=True)]),
            inputs,
            {*self.reward_func_names, *TABLE_COLUMNS},
        )
        rows = [self._with_columns(i, row) for i, row in enumerate(inputs)]
        rewards_per_func = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        # A reward function may give feedback too, through TRL's `log_extra`; it wins over the world's.
        if FEEDBACK in self._pending_extra_logs:
            notes = list(self._pending_extra_logs[FEEDBACK])
            self._columns[FEEDBACK] = notes
        for name, values in self._columns.items():
            self._pending_extra_logs[name] = list(values)
        for name in {*self._logs["extra"]} - {*self._pending_extra_logs, "branch"}:
            self._pending_extra_logs[name] = [None] * len(texts)  # else the table would show an earlier batch's

        self._prompts = prompts  # as the policy saw them: an environment may have added its first observation
        self._completion_tokens = completion_ids_list
        self._truncated = self._cut_short(completion_ids_list)
        start = self.accelerator.process_index * len(prompts)
        local = rewards_per_func[start : start + len(prompts)]
        total = (local * self.reward_weights.to(local.device)).nansum(dim=1)
        self._local_rewards = total.masked_fill(torch.isnan(local).all(dim=1), torch.nan)
        self._log_world()
        return rewards_per_func

    def _with_columns(self, i: int, row: dict[str, Any]) -> dict[str, Any]:
        """A dataset row as the rewards see it, with the world's columns; these may repeat the dataset's values."""
        found = {name: values[i] for name, values in self._columns.items()}
        whole = {**row, **{name: value for name, value in found.items() if value is not None or name not in row}}
        if self.world is not None or self.environment is not None:
            whole[LOST_ROW] = found.get(LOST) or None
        return whole

    def _log_world(self) -> None:
        mode = "train" if self.model.training else "eval"
        names = sorted(set(gather_object(list(self._columns))))  # a rank may lack a column, but not a collective
        missing = [None] * len(self._truncated)
        gathered = {name: gather_object(list(self._columns.get(name, missing))) for name in names}
        for name, value in world_metrics(gathered).items():
            self._metrics[mode][name].append(value)
        if repaired := gather_object(self._repaired):
            self._metrics[mode]["records/repaired"].append(float(len(repaired)))
            self._say(f"texts of the world are no valid Unicode, and were repaired: {repaired[0]}")

    # ----------------------------------------------------------------------------- routing and the teacher's pass

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs if self._is_vlm else without_pictures(inputs))
        branches: list[str | None] = ["grpo"] * len(inputs)
        if self.teacher is not None and self.model.training:
            mask = _loss_mask(batch)
            plan = self._route(mask)
            batch.update(self._distillation_targets(batch, mask, plan))
            rewarded = None if self.objective == "sdpo" else "grpo"
            branches = ["sdpo" if z else rewarded for z in plan.routed.tolist()]
        self._logs["extra"]["branch"].extend(gather_object(branches))
        return batch

    def _route(self, mask: Tensor) -> Plan:
        """Decide on all ranks' completions together, since a group may straddle ranks; keep this rank's part."""
        args, device = self.args, mask.device
        rewards, n = self._local_rewards, mask.size(0)
        scored, correct = ~torch.isnan(rewards), self._succeeded()
        texts = self._tokenizer.batch_decode(self._completion_tokens, skip_special_tokens=True)
        texts = [unfinished(opened, text) for opened, text in zip(self._opened, texts, strict=True)]
        feedback = self._columns.get(FEEDBACK) or [""] * n
        rollouts = gather_object(
            [
                Rollout(text if ok else "", ok, cut, float(reward), str(note or ""))
                for text, ok, cut, reward, note in zip(
                    texts, correct.tolist(), self._truncated, rewards.tolist(), feedback, strict=True
                )
            ]
        )
        chosen = choose_demonstrations(
            rollouts, self.num_generations, args.demonstration, f"{args.seed}:{self.state.global_step}"
        )
        start = self.accelerator.process_index * n
        demonstrations, notes = [], []
        for i in range(start, start + n):
            sibling = None if chosen[i] is None else rollouts[chosen[i]].text
            if sibling is not None and args.remove_thinking_from_demonstration:
                sibling = strip_thinking(sibling)
            wanted = args.include_environment_feedback and rollouts[i].feedback.strip() != ""
            if sibling is not None and args.environment_feedback_only_without_solution:
                wanted = False
            demonstrations.append(sibling)
            notes.append(rollouts[i].feedback if wanted else None)
        available = torch.tensor(
            [d is not None or f is not None for d, f in zip(demonstrations, notes, strict=True)], device=device
        )
        trainable = scored & (mask.sum(dim=1) > 0)
        routed = route(self.objective, correct, available) & trainable
        self._log_routing(routed, correct, available)
        return Plan(routed, demonstrations, notes)

    def _succeeded(self) -> Tensor:
        """[B] bool: completions that count as correct."""
        rewards = self._local_rewards
        if self.correctness is None:
            correct = rewards >= self.args.success_reward_threshold
        else:
            correct = self.correctness(rewards, self._columns).to(rewards.device)
        return correct & ~torch.isnan(rewards) & ~torch.tensor(self._truncated, device=rewards.device)

    def _log_routing(self, routed: Tensor, correct: Tensor, available: Tensor) -> None:
        failed = ~correct
        shares = torch.stack([routed.float(), failed.float(), (failed & available).float()], dim=1)
        totals = self.accelerator.gather(shares).sum(dim=0)
        count = routed.numel() * self.accelerator.num_processes
        metrics = self._metrics["train"]
        metrics["srpo/routed_share"].append((totals[0] / count).item())
        metrics["srpo/failed_share"].append((totals[1] / count).item())
        metrics["srpo/teacher_available"].append((totals[2] / totals[1].clamp(min=1)).item())

    # --------------------------------------------------------------------------------------------------- loss

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        if "routed" not in inputs:  # objective: grpo, and evaluation, where there is no teacher
            return super()._compute_loss(model, inputs)
        mask, routed = _loss_mask(inputs), inputs["routed"]
        logp, entropy, divergence, aux_loss = self._policy_forward(model, inputs, mask)
        old_logp = inputs.get("old_per_token_logps")
        batch = TokenBatch(
            logp=logp,
            old_logp=logp.detach() if old_logp is None else old_logp,
            mask=mask,
            advantages=inputs["advantages"],
            routed=routed,
            divergence=divergence,
            weights=inputs["distillation_weights"],
            counts=self._counts(inputs, mask.size(0)),
            sampler_ratio=inputs.get("importance_sampling_ratio"),
            ref_logp=inputs.get("ref_per_token_logps"),
        )
        output = OBJECTIVES[self.objective](batch, self._loss_config)
        self._log_loss(output.metrics, entropy, mask)
        loss = output.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
            self._metrics["train"]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        return loss

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _counts(self, inputs: dict[str, Any], rows: int) -> Counts:
        """Denominators of one optimiser step; a generation batch may feed several (normaliser.per_step)."""
        args, ranks = self.args, self.accelerator.num_processes

        def share(total: Tensor) -> Tensor:
            return per_step(
                total,
                ranks=ranks,
                accumulation=self.current_gradient_accumulation_steps,
                steps_per_generation=args.steps_per_generation,
            )

        completions = torch.tensor(float(rows * args.steps_per_generation * ranks), device=inputs["routed"].device)
        return Counts(share(inputs["num_items_in_batch"]), share(inputs["distilled_tokens"]), share(completions))

    def _policy_forward(
        self, model: torch.nn.Module, inputs: dict[str, Any], mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One forward of the student: log-probs, entropies, divergences [B, T], and the MoE auxiliary loss."""
        length = inputs["completion_ids"].size(1)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        labels = ids.masked_fill(attention == 0, -100)  # completion tokens only, as in TRL
        labels[:, :-length] = -100
        routed = inputs["routed"]
        omega = mask.bool() & routed.unsqueeze(1)

        def probe(gradient: Tensor) -> None:
            squares = gradient.float().square().sum(dim=(1, 2))
            self._branch_gradients += torch.stack([squares[routed].sum(), squares[~routed].sum()])

        extra = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self.accelerator.autocast(), scored_among(self._scored_model(model), inputs.get("choices")):
            output = model(
                input_ids=ids,
                attention_mask=attention,
                labels=labels,
                fused_lm_head=True,
                targets=self._teacher_targets(inputs, omega),
                gradient_probe=probe,
                **extra,
            )
        logp, entropy = output.log_probs[:, -length:], output.entropy[:, -length:]
        divergence = output.divergence
        if "teacher_logps" in inputs and omega.any():
            divergence = sampled_token_divergence(logp, inputs["teacher_logps"]) * omega
        return logp, entropy, divergence, output.aux_loss

    def _log_loss(self, metrics: dict[str, Tensor], entropy: Tensor, mask: Tensor) -> None:
        # The objective's metrics add up over micro-batches; TRL averages what is appended here.
        scaled = torch.stack(list(metrics.values())).detach() * self.current_gradient_accumulation_steps
        means = self.accelerator.gather(scaled.unsqueeze(0)).mean(dim=0)
        for name, value in zip(metrics, means.tolist(), strict=True):
            self._metrics["train"][name].append(value)
        nats, count = self._sum_over_ranks(torch.stack([(entropy * mask).sum(), mask.sum().float()]).detach())
        self._metrics["train"]["entropy"].append((nats / count.clamp(min=1)).item())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.teacher is not None and self.accelerator.sync_gradients:
            norms = self._sum_over_ranks(self._branch_gradients).sqrt()
            if norms.sum() > 0:
                self._metrics["train"]["srpo/gradient_share"].append((norms[0] / norms.sum()).item())
            self._branch_gradients.zero_()
        return loss

    # ------------------------------------------------------------------------------------------------ records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # adds the averaged metrics to `logs`
        numbers = {name: value for name, value in logs.items() if isinstance(value, float)}
        if self.model.training:
            self.alarms.observe_step(numbers, self.max_completion_length)
        elif "eval_reward" in numbers:
            self.alarms.observe_evaluation(numbers["eval_reward"])


class SDPOTrainer(SRPOTrainer):
    """[`SRPOTrainer`] with `objective="sdpo"`: every completion with teacher information is distilled."""

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        super().__init__(model, reward_funcs, _with_objective(args, "sdpo"), *rest, **kwargs)


class GRPOTrainer(SRPOTrainer):
    """[`SRPOTrainer`] with `objective="grpo"`: TRL's GRPO, any loss type, with this library's world and records."""

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        super().__init__(model, reward_funcs, _with_objective(args, "grpo"), *rest, **kwargs)


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    """[B, T]: completion tokens that the policy sampled and that are trained on."""
    return batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]


def datasets_of(arguments: Mapping[str, Any]) -> list[Any]:
    """The datasets among a trainer's arguments; `eval_dataset` may be several."""
    evaluation = arguments.get("eval_dataset")
    return [arguments.get("train_dataset"), *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]


def _init_kwargs(args: SRPOConfig) -> dict[str, Any]:
    """How TRL loads a policy that is given by its path."""
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    return options


def _with_objective(args: GRPOConfig | None, objective: str) -> SRPOConfig:
    if args is None:
        return SRPOConfig(output_dir=f"{objective}-output", objective=objective)
    args = as_srpo_config(args)
    args.objective = objective
    return args
