"""The Router-R1 recipes against the numbers of the specification, and the task arguments' own checks."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from routers.data.catalogue import load_catalogue
from routers.data.questions import SETS
from routers.language.grammar import name_error
from routers.tasks.think_route.arguments import ThinkRouteArguments
from routers.tasks.think_route.task import ThinkRoute
from srpo import SRPOConfig
from srpo.task import RunArguments

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("Qwen2.5-3B-Instruct", "Llama-3.2-3B-Instruct")
# Router-R1, router_r1/llm_agent/route_service.py: USD per million tokens (specification 1.3).
PRICES = {
    "Qwen2.5-7B-Instruct": 0.30,
    "LLaMA-3.1-70B-Instruct": 0.88,
    "LLaMA-3.1-8B-Instruct": 0.18,
    "Mistral-7B-Instruct": 0.20,
    "Mixtral-8x22B-Instruct": 1.20,
    "Gemma-2-27B-Instruct": 0.80,
    "Palmyra-Creative-122B": 1.80,
    "LLaMA3-ChatQA-1.5-8B": 0.18,
}


def recipe(model: str, objective: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / model / objective / "router_r1.yaml").read_text())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("objective", ["grpo", "srpo"])
def test_the_paper_s_settings(model: str, objective: str) -> None:
    r = recipe(model, objective)
    assert r["model_name_or_path"].endswith(model) and r["objective"] == objective
    assert (r["train_data"], r["test_data"]) == (["nq", "hotpotqa"], list(SETS))
    assert (r["train_limit"], r["heldout_limit"], r["question_seed"]) == (7000, 500, 42)
    assert (r["max_turns"], r["max_turn_tokens"], r["max_observation_tokens"]) == (4 + 1, 1024, 600)
    batches = r["max_steps"] * r["prompts_per_step"] * r["num_generations"] / r["generation_batch_size"]
    assert (r["prompts_per_step"], r["generation_batch_size"], batches) == (32, 64 * r["num_generations"], 225)
    assert (r["temperature"], r["reward"], r["cost_weight"], r["metric"]) == (1.0, "router_r1", 0.0, "em")
    assert (r["use_vllm"], r["vllm_mode"]) == (True, "server")
    if objective == "grpo":
        assert (r["learning_rate"], r["beta"], r["epsilon"], r["warmup_steps"]) == (1e-6, 0.001, 0.2, 0)
    else:
        assert (r["learning_rate"], r["epsilon_high"], r["beta"]) == (5e-6, 0.28, 0.0)
    text = (ROOT / "recipes" / model / objective / "router_r1.yaml").read_text()
    assert "NOT RUN BY US" in text and "recipes/slurm/train.slurm" in text


def test_the_catalogue_is_router_r1_s_pool() -> None:
    members = load_catalogue(ROOT / "recipes" / "catalogues" / "router_r1.yaml")
    assert {name: m.price_out for name, m in members.items()} == PRICES
    for name, member in members.items():
        assert not name_error(name)
        assert (member.max_tokens, member.seed, member.concurrency) == (512, 42, 10)
        assert member.api_key_env == "NVIDIA_API_KEY"
        assert member.temperature == (0.1 if name.startswith("Gemma") else 0.0)
        assert member.price_in == member.price_out
    unseen = recipe(MODELS[0], "grpo")["unseen_members"]
    assert [name for name in members if name not in unseen] == list(PRICES)[:6]


def test_the_two_models_differ_in_nothing_but_the_model() -> None:
    for objective in ("grpo", "srpo"):
        first, second = (recipe(model, objective) for model in MODELS)
        differing = {key for key in first | second if first.get(key) != second.get(key)}
        assert differing == {"model_name_or_path", "output_dir"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either table, or train_data"),
        ({"table": "quickstart", "train_data": ["nq"]}, "either table, or train_data"),
        ({"train_data": ["nq"], "pool": "endpoint", "catalogue": "x"}, "needs test_data"),
        ({"train_data": ["nq"], "test_data": ["nq"]}, "pool: recorded needs a table"),
        ({"table": "quickstart", "pool": "endpoint"}, "pool: endpoint needs a catalogue"),
        ({"table": "quickstart", "pool": "live"}, "pool='live' is not one of recorded, endpoint"),
        ({"table": "quickstart", "reward": "x"}, "reward='x' is not one of additive"),
        ({"table": "quickstart", "replies": "x"}, "replies='x' is not one of full"),
    ],
)
def test_arguments_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThinkRouteArguments(**options)


@pytest.mark.parametrize(
    ("options", "epochs", "message"),
    [
        ({"train_data": ["nq"], "test_data": ["nq"], "pool": "endpoint", "catalogue": "x"}, 1, "replies of a table"),
        ({"table": "quickstart"}, 1.5, "give a whole number"),
    ],
)
def test_supervised_starts_that_cannot_be_made_are_refused(
    options: dict[str, Any], epochs: float, message: str, tmp_path: Path
) -> None:
    config = SRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=message):
        ThinkRoute(ThinkRouteArguments(**options), RunArguments("think_route", sft_epochs=epochs), config)
