"""R3 with the vLLM engine that TRL keeps in the training processes (`vllm_mode: colocate`).

TRL builds the engine without the flag that makes it return its experts, and drops them if it does. Both are put right
here, around TRL's own code. The formats are those of `srpo.replay.engines`. Run against vLLM 0.30 on a CPU: its
routes are those of our own forward (tests/srpo/test_vllm_live.py).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from srpo.replay.engines import vllm_routes
from srpo.replay.expert_table import RouterSpec
from srpo.rollout.vllm_settings import engine_built_with


def returning_routes() -> AbstractContextManager[None]:
    """Engines that TRL builds inside return their routed experts."""
    return engine_built_with(lambda _: {"enable_return_routed_experts": True})


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
