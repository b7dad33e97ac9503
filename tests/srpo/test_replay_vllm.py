"""The seam to TRL's colocated vLLM engine, on answers in vLLM's documented shapes. No engine runs here."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.generation import vllm_generation

from srpo.replay.expert_table import RouterSpec
from srpo.replay.vllm import EngineRoutes, returning_routes

SPEC = RouterSpec(layers=(1, 2), num_layers=3, top_k=2, num_experts=8)
PROMPTS, COMPLETIONS = [[5, 6, 7], [8, 9]], [[1, 2], [3, 4, 5]]


def table(tokens, first=0):
    """[tokens, 3, 2]: token t runs experts t and t + 1 in layer 1, t + 2 and t + 3 in layer 2; layer 0 is dense."""
    rows = [[[0, 0], [t, t + 1], [t + 2, t + 3]] for t in range(first, first + tokens)]
    return np.array(rows, dtype=np.int16)


def answers(split=False):
    outputs = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        fed = len(prompt) + len(completion) - 1
        whole = table(fed)
        choice = SimpleNamespace(token_ids=completion, routed_experts=whole[len(prompt) :] if split else whole)
        answer = SimpleNamespace(prompt_token_ids=prompt, outputs=[choice])
        if split:
            answer.prompt_routed_experts = whole[: len(prompt)]
        outputs.append(answer)
    return outputs


def engine(outputs):
    llm = SimpleNamespace(generate=lambda prompts, **_: outputs)
    generation = SimpleNamespace(llm=llm, tensor_parallel_size=1)
    routes = EngineRoutes(generation, SPEC)
    assert generation.llm.generate([], sampling_params=None) is outputs, "TRL must get what the engine said"
    return routes


@pytest.mark.parametrize("split", [False, True])
def test_rows_of_prompt_and_completion(split):
    rows = engine(answers(split)).rows(PROMPTS, COMPLETIONS)
    assert [len(row) for row in rows] == [5, 5] and rows[0].dtype == torch.int16
    assert rows[0][3].tolist() == [[3, 4], [5, 6]] and rows[1][4].tolist() == [[-1, -1], [-1, -1]]


def test_answers_of_another_request_are_refused():
    with pytest.raises(ValueError, match="completion 0: vLLM's answer belongs to another prompt"):
        engine(answers()).rows(PROMPTS[::-1], COMPLETIONS[::-1])


def test_an_engine_without_the_flag_is_named():
    outputs = answers()
    del outputs[1].outputs[0].routed_experts
    with pytest.raises(ValueError, match="enable_return_routed_experts"):
        engine(outputs).rows(PROMPTS, COMPLETIONS)


def test_the_engine_is_built_with_the_flag(monkeypatch):
    built = []
    engine = lambda **kwargs: built.append(kwargs)  # noqa: E731
    monkeypatch.setattr(vllm_generation, "LLM", engine, raising=False)
    with returning_routes():
        vllm_generation.LLM(model="x")
    assert built == [{"model": "x", "enable_return_routed_experts": True}]
    assert vllm_generation.LLM is engine


def test_trl_builds_and_asks_the_engine_where_we_think():
    source = inspect.getsource(vllm_generation.VLLMGeneration)
    assert "self.llm = LLM(" in source and "all_outputs = self.llm.generate(" in source
    assert "tp_slice = slice(local_rank_in_group * orig_size, (local_rank_in_group + 1) * orig_size)" in source
    assert '"n": 1,' in source, "one completion per prompt and answer in colocate mode"
