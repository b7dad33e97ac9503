"""Turns from vLLM, through TRL's own engine: `vllm_mode: server` and `colocate`.

TRL's call takes one set of sampling parameters for a whole batch and, where engines are shared, the same number of
prompts from every process. So requests are sent in as many calls as there are kinds of them (free text; each set of
choices), every process makes the same calls, and a process that has nothing to ask fills up with short prompts. Seeds
of single rows cannot be given: samples are not repeatable. vLLM keeps the prefix of a conversation by itself
(`--enable-prefix-caching`, its default).

What ends a turn and what a choice is drawn from are said in every request, so that neither the folder that vLLM has
read nor `generation_kwargs` decide them: free text ends at the trainer's end tokens and stop strings, and a choice is
drawn at the temperature alone, as in `srpo.rollout.generator.draw`. Where min_p is set beside top_k or top_p, vLLM
cuts by it first and transformers last.
"""

from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from srpo.rollout.generator import Stops
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.turns import Request, Sample
from srpo.rollout.vllm_settings import context_limit

_TEMPERATURE_ONLY = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class VLLMGenerator:
    """`srpo.rollout.turns.Generator` over `trl.generation.vllm_generation.VLLMGeneration`.

    Log-probs are vLLM's, of the processed distribution: after temperature, top-p and the choices' mask. A server must
    be started with `--logprobs-mode processed_logprobs`, as TRL demands for its own correction.

    Args:
        engine: TRL's, with the current weights. Free text is sampled with its parameters and `generation_kwargs`, but
            for the length and the ends; a choice with its temperature.

    Raises:
        ValueError: a context and its turn do not fit into the engine.
    """

    def __init__(self, engine: Any, tokenizer: Any, sampling: Sampling, *, eos_ids: Sequence[int]):
        self._engine = engine
        self._stops = Stops(tokenizer, sampling.stop)
        self._stop = list(sampling.stop)
        self._eos = tuple(eos_ids)
        self._context = context_limit(engine)

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        longest = max((len(request.ids) + request.max_tokens for request in requests), default=0)
        if self._context is not None and longest > self._context:
            raise ValueError(
                f"use_vllm: a context and the turn after it may take {longest} tokens, and vLLM was started for "
                f"{self._context}; set vllm_max_model_length to {longest} or more, or lower max_completion_length"
            )
        samples, _ = self._round(requests)
        return samples

    @property
    def in_step(self) -> bool:
        """Whether processes must ask equally often, as they share an engine."""
        return PartialState().num_processes > 1

    def over(self, rows: Sequence[int]) -> None:
        """vLLM forgets by itself."""

    def finish(self) -> None:
        busy = True
        while busy:
            _, busy = self._round(())

    def _round(self, requests: Sequence[Request]) -> tuple[list[Sample], bool]:
        """The samples, and whether any process asked for one."""
        kinds: dict[tuple[int, ...], list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(request.choices or (), []).append(i)
        mine = {kind: (len(rows), max(requests[i].max_tokens for i in rows)) for kind, rows in kinds.items()}
        shares = gather_object([mine])
        samples: dict[int, Sample] = {}
        for kind in sorted({kind for share in shares for kind in share}):
            asked = [share[kind] for share in shares if kind in share]
            rows = kinds.get(kind, [])
            filler = [[0]] * (max(count for count, _ in asked) - len(rows))
            prompts = [list(requests[i].ids) for i in rows] + filler
            answers = self._ask(prompts, kind, max(tokens for _, tokens in asked))
            for i, (ids, logprobs) in zip(rows, answers, strict=False):  # the fillers' answers are left over
                samples[i] = self._sample(requests[i], ids, logprobs)
        return [samples[i] for i in range(len(requests))], any(shares)

    def _ask(self, prompts: list[list[int]], choices: tuple[int, ...], max_tokens: int) -> list[tuple[Any, Any]]:
        engine = self._engine
        before = engine.max_completion_length, engine.generation_kwargs, engine.structured_outputs_regex
        if choices:
            engine.max_completion_length, engine.structured_outputs_regex = 1, None
            engine.generation_kwargs = {**_TEMPERATURE_ONLY, "allowed_token_ids": list(choices)}
        else:
            ends: dict[str, Any] = {"stop_token_ids": list(self._eos), "ignore_eos": True}  # vLLM's own are ignored
            if self._stop:
                ends |= {"stop": self._stop, "include_stop_str_in_output": True, "skip_special_tokens": True}
            engine.max_completion_length = max_tokens
            engine.generation_kwargs = {**(engine.generation_kwargs or {}), **ends}
        try:
            _, ids, logprobs, _ = engine.generate(prompts=prompts, images=None, num_generations=1)
        finally:
            engine.max_completion_length, engine.generation_kwargs, engine.structured_outputs_regex = before
        return list(zip(ids, logprobs, strict=True))

    def _sample(self, request: Request, ids: Sequence[int], logprobs: Sequence[Any]) -> Sample:
        # One call has one limit: what a row wrote beyond its own is dropped. The first tokens are still a sample.
        ids = tuple(ids[: request.max_tokens])
        first = [entry[0] for entry in logprobs[: len(ids)]]  # of the sampled token; None where vLLM has NaN
        ended = request.choices is not None or len(ids) < request.max_tokens
        ended = ended or ids[-1] in self._eos or self._stops.ended(ids)
        return Sample(ids, tuple(float("nan") if x is None else x for x in first), ended)
