"""The policy's generators, on the weights that it has now: for episodes, and for completions of one turn.

Every completion draws from a seed of its own, named by run, step, row and prompt. So a run that is taken up again
draws what it would have drawn, and no sample depends on what else is in its batch, up to rounding.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from trl.models.utils import unwrap_model_for_generation

from srpo.rollout.each_of import EachOf
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Generator, Request, Sample
from srpo.trainer.generation_step import GenerationStep


def sampling_of(args: Any) -> Sampling:
    """The sampling distribution that a configuration describes."""
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop_strings),
    )


class Sampler:
    """Makes the generators of a run that samples with transformers.

    Args:
        args: the configuration.
        tokenizer: of the policy.
    """

    def __init__(self, args: Any, accelerator: Accelerator, tokenizer: Any) -> None:
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer

    @contextmanager
    def policy(self, model_wrapped: Any, backend: Any, eos_ids: list[int], **how: Any) -> Iterator[Generator]:
        """The generator of one generation batch, on the current weights.

        Args:
            model_wrapped: the policy in its engine.
            backend: what TRL knows of that engine.
            how: further arguments of `TransformersGenerator`.
        """
        # Whether every process generates with whole parameters that ZeRO-3 has sharded.
        whole = bool(backend.is_zero3 and self.args.ds3_gather_for_generation)
        sharded = (backend.is_zero3 or backend.is_fsdp) and not whole
        with (
            unwrap_model_for_generation(
                model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            backend.summon_full_params(model_wrapped, recurse=False),
            _out_of_step(model_wrapped) if whole else nullcontext(),
        ):
            training = model.training
            model.eval()  # dropout would draw from the run's random state, in the order of the batch
            try:
                yield self.make_generator(model, eos_ids, any_busy=self._any_busy if sharded else None, **how)
            finally:
                model.train(training)

    def make_generator(self, model: Any, eos_ids: list[int], **how: Any) -> TransformersGenerator:
        """Of a bare model."""
        return TransformersGenerator(model, self.tokenizer, sampling_of(self.args), eos_ids=eos_ids, **how)

    def completions(
        self, generator: Generator, step: GenerationStep, prompt_ids: Sequence[Sequence[int]], allowed: Any = None
    ) -> list[Sample]:
        """One completion for each prompt of this process.

        Args:
            allowed: of the trainer's `allowed_tokens`, `EachOf` fills the groups of a training.

        Raises:
            ValueError: a prompt without a token.
        """
        if not all(map(len, prompt_ids)):
            raise ValueError("a prompt has no token: leave its row out, or write something into it")
        when = step.named(self.args.seed)
        start = self.accelerator.process_index * len(prompt_ids)
        each = allowed if isinstance(allowed, EachOf) and step.training else None
        size = self.args.num_generations
        requests = []
        for i, ids in enumerate(prompt_ids):
            text = hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()[:16]
            drawn = f"{start + i}"
            if each is not None:
                group, beginning, _ = each.place(start + i, size)
                drawn = f"{group}.{beginning}"
            seed = f"{when}:{drawn}:{text}"
            requests.append(Request(i, tuple(ids), seed, self.args.max_completion_length))
        if each is None:
            samples = generator.generate(requests)
        else:
            samples, importance = each.completions(generator, requests, start, size)
            step.importance = torch.tensor(importance, device=self.accelerator.device)
        generator.finish()
        return samples

    def _any_busy(self, busy: bool) -> bool:
        flag = torch.tensor([float(busy)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)


@contextmanager
def _out_of_step(engine: Any) -> Iterator[None]:
    """Processes may take different numbers of forwards, or none, of parameters that ZeRO-3 has gathered.

    TRL takes DeepSpeed's hooks off the gathered model, all but one: at the start of a forward it compares across
    processes in which order modules were used. A process without that forward would be waited for without end.
    """
    optimizer = getattr(engine, "optimizer", None)  # before the first training step: none, or the offload itself
    offload = getattr(optimizer, "parameter_offload", optimizer)
    if offload is None:
        yield
        return
    offload.param_coordinator.reset_step = lambda: None
    try:
        yield
    finally:
        del offload.param_coordinator.reset_step
