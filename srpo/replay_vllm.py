"""R3 with the vLLM engine that TRL keeps in the training processes (`vllm_mode: colocate`).

TRL builds the engine without the flag that makes it return its experts, and drops them if it does. Both are put right
here, around TRL's own code. Not run against a live engine: no machine with vLLM was at hand. The formats are those of
`srpo.replay_engines`.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.generation import vllm_generation

from srpo.replay_engines import vllm_routes
from srpo.routed_experts import RouterSpec


@contextmanager
def returning_routes() -> Iterator[None]:
    """Engines that TRL builds inside return their routed experts."""
    engine = getattr(vllm_generation, "LLM", None)
    if engine is None:  # vLLM is not installed, which TRL reports better
        yield
        return
    vllm_generation.LLM = functools.partial(engine, enable_return_routed_experts=True)
    try:
        yield
    finally:
        vllm_generation.LLM = engine


class EngineRoutes:
    """Keeps what the engine answered, so that its experts can be read after TRL has taken ids and log-probs.

    Args:
        generation: TRL's `VLLMGeneration` with an engine of `returning_routes`.
    """

    def __init__(self, generation: Any, spec: RouterSpec):
        self._generation, self._spec = generation, spec
        self._outputs: Sequence[Any] = ()
        generate = generation.llm.generate

        def keep(*args: Any, **kwargs: Any) -> Any:
            self._outputs = generate(*args, **kwargs)
            return self._outputs

        generation.llm.generate = keep

    def rows(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Ragged routes of the last rollout, one per completion of this rank.

        Raises:
            ValueError: the engine returned none, or they are not those of these prompts and completions.
        """
        start = 0
        if self._generation.tensor_parallel_size > 1:  # the engine has answered for all ranks of its group, in order
            start = torch.distributed.get_rank(group=self._generation.tp_group) * len(prompt_ids)
        outputs, self._outputs = self._outputs[start : start + len(prompt_ids)], ()
        rows = []
        for i, (prompt, completion, output) in enumerate(zip(prompt_ids, completion_ids, outputs, strict=True)):
            choice = output.outputs[0]
            if list(output.prompt_token_ids) != list(prompt) or list(choice.token_ids) != list(completion):
                raise ValueError(f"completion {i}: vLLM's answer belongs to another prompt or completion than TRL's")
            routes = vllm_routes(
                getattr(choice, "routed_experts", None),
                len(prompt) + len(completion),
                self._spec,
                getattr(output, "prompt_routed_experts", None),
                len(prompt),
            )
            rows.append(routes)
        return rows
