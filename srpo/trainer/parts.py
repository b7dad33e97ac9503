"""The parts of a trainer that have to know more than one of the others: built by its constructor, once, in this order.

twin_of (before TRL's constructor) -> rollouts_of -> share_prefixes -> distiller_of
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from srpo.prefix.sharing import PrefixSharing
from srpo.replay.replay import RoutingReplay
from srpo.rollout.sampling_rules import samples_itself, without_adapter
from srpo.teacher.lm_head import add_scoring_head
from srpo.teacher.teacher import plain_copy, unpatched_copy
from srpo.trainer.arguments import init_kwargs
from srpo.trainer.distiller import Distiller
from srpo.trainer.forward_checks import ForwardChecks, still
from srpo.trainer.overlap import Ahead, refuse_ahead
from srpo.trainer.precision import engine_keeps_masters, train_in_fp32
from srpo.trainer.rollouts import Rollouts
from srpo.types import Environment


def twin_of(model: str | PreTrainedModel, args: Any, peft_config: Any, distils: bool) -> PreTrainedModel | None:
    """A copy of the policy as it is given, for the teacher; None where the teacher needs none. A policy that trains
    whole is in fp32 afterwards: teacher and reference take its precision."""
    if peft_config is not None or (not isinstance(model, str) and is_peft_model(model)):
        return None
    if not isinstance(model, str):
        train_in_fp32(model, args)
    if not distils or args.teacher_model_kind == "live":
        return None
    in_fp32 = args.teacher_model_kind == "ema" or not engine_keeps_masters(args)
    return unpatched_copy(model, init_kwargs(args), in_fp32)


@contextmanager
def evaluates_by(heldout: Any, args: Any) -> Iterator[None]:
    """Around TRL's constructor: transformers asks for an `eval_dataset`, which `heldout` takes the place of."""
    evaluated = args.eval_strategy
    if heldout is not None:
        args.eval_strategy = IntervalStrategy.NO
    try:
        yield
    finally:
        args.eval_strategy = evaluated


def base_of(trainer: Any, model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside."""
    base: PreTrainedModel = without_adapter(trainer.accelerator.unwrap_model(model))
    return base


def our_generator_samples(trainer: Any) -> bool:
    """Whether completions of one turn are sampled by `srpo.rollout.generator` (`samples_itself`)."""
    args = trainer.args
    needs = {
        "environment=": trainer.environment is not None,
        "allowed_tokens=": trainer.allowed_tokens is not None,
        "loss_type: minirl": trainer._record.sampler_logps,
        f"routing_replay: {args.routing_replay}": trainer.replay_passes is not None,
    }
    needed = [name for name, is_needed in needs.items() if is_needed]
    return not trainer.use_vllm and samples_itself(args, trainer.model, trainer._is_vlm, needed)


def rollouts_of(environment: Environment | None, trainer: Any) -> Rollouts | None:
    """What plays the episodes of an environment."""
    if environment is None:
        return None
    args = trainer.args
    rollouts = Rollouts(environment, args, trainer.accelerator, trainer._tokenizer, trainer.num_generations)
    if args.rollout_ahead:
        sharded = trainer._dist.is_zero3 or trainer._dist.is_fsdp
        refuse_ahead(args, is_peft_model(trainer.model), sharded, trainer.train_dataset)
        rollouts.ahead = Ahead(plain_copy(base_of(trainer, trainer.model)))
    return rollouts


def share_prefixes(trainer: Any, twin: PreTrainedModel | None) -> PrefixSharing:
    """Give policy, reference and the teacher's twin the head that scores; how the policy's passes share beginnings."""
    mode = "off" if trainer._is_vlm else trainer.args.shared_prefix
    sharded = trainer.accelerator.distributed_type in ("DEEPSPEED", "FSDP")

    def added(model: torch.nn.Module, replay: RoutingReplay | None) -> PrefixSharing:
        base = base_of(trainer, model)
        sharing = PrefixSharing(base, mode, sharded, replay)
        add_scoring_head(base, sharing, trainer.temperature)
        return sharing

    passes = trainer.replay_passes
    sharing = added(trainer.model, None if passes is None else passes.replay)
    for other in filter(None, (trainer.ref_model, twin)):
        added(other, None)
    return sharing


def distiller_of(trainer: Any, twin: PreTrainedModel | None) -> Distiller | None:
    """Who is distilled and from what; None where the objective distils nobody."""
    if not trainer._record.distils(trainer.args) or trainer._is_vlm:
        return None
    words = (trainer._tokenizer, lambda prompts: trainer._tokenize_prompts(prompts)[0])
    student, metrics = (trainer.model, twin), trainer._metrics["train"]
    return Distiller(trainer._record, *student, trainer.args, trainer.accelerator, *words, metrics)


def forward_checks_of(trainer: Any) -> ForwardChecks | None:
    """What looks at noise and padding in the models of a text policy; `disable_dropout` takes the noise away."""
    if trainer.args.disable_dropout:
        for noisy in filter(None, (trainer.model, trainer.ref_model)):
            still(noisy)
    if trainer._is_vlm:
        return None
    others = [trainer.ref_model, None if trainer.teacher is None else trainer.teacher.model]
    models = [base_of(trainer, model) for model in (trainer.model, *others) if model is not None]
    return ForwardChecks(trainer.model, models, trainer.args, trainer.accelerator.autocast)
