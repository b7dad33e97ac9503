"""Turns from vLLM, through TRL's own engine: `vllm_mode: server` and `colocate`.

TRL's call takes one set of sampling parameters for a whole batch and, where engines are shared, the same number of
prompts from every process. So requests are sent in as many calls as there are kinds of them (free text; each set of
choices), every process makes the same calls, and a process that has nothing to ask fills up with short prompts. Seeds
of single rows cannot be given: samples are not repeatable. vLLM keeps the prefix of a conversation by itself
(`--enable-prefix-caching`, its default).
"""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from srpo.generate import Request, Sample
from srpo.sampling import Sampling, Stops


class VLLMGenerator:
    """`srpo.generate.Generator` over `trl.generation.vllm_generation.VLLMGeneration`.

    Log-probs are vLLM's, of the processed distribution: after temperature, top-p and the choices' mask. A server must
    be started with `--logprobs-mode processed_logprobs`, as TRL demands for its own correction.

    Args:
        engine: TRL's, with the current weights. Its sampling parameters other than the length, the stop strings and
            the allowed ids stay as they are.
    """

    def __init__(self, engine: Any, tokenizer: Any, sampling: Sampling, *, eos_ids: Sequence[int]):
        self._engine = engine
        self._stops = Stops(tokenizer, sampling.stop)
        self._stop = list(sampling.stop)
        self._eos = tuple(eos_ids)

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        samples, _ = self._round(requests)
        return samples

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
            filler = [[self._eos[0]]] * (max(count for count, _ in asked) - len(rows))
            prompts = [list(requests[i].ids) for i in rows] + filler
            answers = self._ask(prompts, kind, max(tokens for _, tokens in asked))
            for i, (ids, logprobs) in zip(rows, answers, strict=False):  # the fillers' answers are left over
                samples[i] = self._sample(requests[i], ids, logprobs)
        return [samples[i] for i in range(len(requests))], any(shares)

    def _ask(self, prompts: list[list[int]], choices: tuple[int, ...], max_tokens: int) -> list[tuple[Any, Any]]:
        engine = self._engine
        before = engine.max_completion_length, engine.generation_kwargs
        options = {**(engine.generation_kwargs or {})}
        if choices:
            engine.max_completion_length = 1
            options["allowed_token_ids"] = list(choices)
        else:
            engine.max_completion_length = max_tokens
            if self._stop:
                options.update(stop=self._stop, include_stop_str_in_output=True)
        engine.generation_kwargs = options
        try:
            _, ids, logprobs, _ = engine.generate(prompts=prompts, images=None, num_generations=1)
        finally:
            engine.max_completion_length, engine.generation_kwargs = before
        return list(zip(ids, logprobs, strict=True))

    def _sample(self, request: Request, ids: Sequence[int], logprobs: Sequence[Any]) -> Sample:
        # One call has one limit: what a row wrote beyond its own is dropped. The first tokens are still a sample.
        ids = tuple(ids[: request.max_tokens])
        first = [entry[0] for entry in logprobs[: len(ids)]]  # of the sampled token; None where vLLM has NaN
        ended = request.choices is not None or len(ids) < request.max_tokens
        ended = ended or ids[-1] in self._eos or self._stops.ended(ids)
        return Sample(ids, tuple(float("nan") if x is None else x for x in first), ended)
