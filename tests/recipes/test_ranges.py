"""Every number that a user may set has a range, and what lies outside is refused by name before anything starts."""

import argparse
import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_helpers import config

from rewards.boundary import BoundaryReward
from routers.evaluation.episodes import RewardRule
from routers.tasks.query_routing.arguments import QueryRoutingArguments
from routers.tasks.step_routing.arguments import DifficultyRule, StepRoutingArguments, Synthesis
from routers.tasks.step_routing.budget import Budget
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.think_route.arguments import ThinkRouteArguments
from routers.tasks.think_route.settings import AgentSettings
from srpo import SRPOConfig
from srpo.cli import COMMANDS
from srpo.ranges import OutOfRange, above, at_least, between, check_number, check_numbers, numeric_fields, ranged
from srpo.recipe import RecipeError, load_recipe
from srpo.rollout.loop import Limits
from srpo.rollout.sampling_rules import Sampling
from srpo.task import RunArguments, find_task, task_names

RECIPES = {RunArguments, SRPOConfig, *(find_task(name).Arguments for name in task_names())}
MADE: list[Any] = [
    RunArguments("a task"),
    QueryRoutingArguments(),
    ThinkRouteArguments(table="quickstart"),
    StepRoutingArguments(),
    AgentSettings(),
    StepSettings(("a", "b"), ("<a>", "<b>")),
    Sampling(),
    Limits(1, 1, 1, 1.0),
    Budget(None),
    Synthesis(),
    DifficultyRule(),
    BoundaryReward(),
    RewardRule(1.0),
]
SCRIPTS = [*(module for module, _ in COMMANDS.values()), "benchmark_pool", "benchmark_replay", "benchmark_step"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Any]:
    return [*MADE, config(tmp_path_factory.mktemp("config"))]


def test_every_numeric_field_has_a_range(made):
    missing = {cls for cls in RECIPES if numeric_fields(cls)} - {type(one) for one in made}
    assert not missing, "a class of a recipe that this test does not walk over"
    for one in made:
        known, ranges = set(numeric_fields(type(one))), set(type(one).RANGES)
        assert known <= ranges, f"{type(one).__name__}: no range for {sorted(known - ranges)}"
        if not isinstance(one, SRPOConfig):  # whose fields differ between versions of transformers
            assert ranges <= known, f"{type(one).__name__}: a range for no field: {sorted(ranges - known)}"


def test_no_field_takes_what_is_no_number(made):
    for one in made:
        for name, number in numeric_fields(type(one)).items():
            allowed = type(one).RANGES[name]
            bad: list[Any] = [math.nan, -math.inf, True, *([] if math.inf in allowed.also else [math.inf])]
            bad += [] if number.text else ["1"]
            bad += [1.5] if number.whole else []
            bad += [allowed.low - 1] if math.isfinite(allowed.low) and allowed.low - 1 not in allowed else []
            for value in bad:
                broken = _with(one, name, [value] if number.several else value)
                with pytest.raises(OutOfRange, match=rf"^{name}.*: must be") as caught:
                    check_numbers(broken)
                assert repr(value) in str(caught.value)


def _with(one: Any, name: str, value: Any) -> Any:
    broken = object.__new__(type(one))
    broken.__dict__.update(vars(one))
    object.__setattr__(broken, name, value)
    return broken


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"temperature": math.nan}, "temperature=nan: must be above 0"),
        ({"learning_rate": -1e-6}, "learning_rate=-1e-06: must be at least 0"),
        ({"learning_rate": math.inf}, "learning_rate=inf: must be at least 0"),
        ({"beta": -0.1}, "beta=-0.1: must be at least 0"),
        ({"max_completion_length": 0}, "max_completion_length=0: must be at least 1"),
        ({"num_generations": 0}, "num_generations=0: must be at least 2"),
        ({"num_generations": 1}, "num_generations=1: must be at least 2"),
        ({"num_generations": True}, "num_generations=True: must be a whole number, at least 2"),
        ({"num_generations": 4.0}, "num_generations=4.0: must be a whole number, at least 2"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"steps_per_generation": 0}, "steps_per_generation=0"),
        ({"max_steps": 0}, r"max_steps=0: must be at least 1 or -1"),
        ({"num_train_epochs": 0.0}, "num_train_epochs=0.0: must be above 0"),
        ({"top_p": 0.0}, r"top_p=0.0: must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5: must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 2.0}, r"min_p=2.0: must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"epsilon": -0.2}, "epsilon=-0.2"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1.0: must be in \[0, 1\)"),
        ({"reward_weights": [1.0, math.nan]}, r"reward_weights\[1\]=nan: must be a finite number"),
        ({"learning_rate": "1e-6"}, "learning_rate='1e-6': must be a number, at least 0"),
        ({"step_deadline": math.inf}, "step_deadline=inf"),
        ({"max_cost_usd": -1.0}, "max_cost_usd=-1.0"),
        ({"generation_kwargs": {"temperature": math.nan}}, "generation_kwargs holds nan"),
        ({"generation_kwargs": '{"min_p": NaN}'}, "generation_kwargs holds nan"),
        ({"seed": -1}, r"seed=-1: must be in \[0, 4294967295\]"),
    ],
)
def test_numbers_of_a_training_that_cannot_be_meant(tmp_path, change, words):
    with pytest.raises(OutOfRange, match=words):
        config(tmp_path, **change)


@pytest.mark.parametrize(
    ("cls", "line", "words"),
    [
        (QueryRoutingArguments, "format_weight: -5", "recipe.yaml:2: format_weight=-5.0: must be at least 0"),
        (QueryRoutingArguments, "cost_weight: .nan", r"recipe.yaml:2: cost_weight=nan: must be in \[0, 1\)"),
        (RunArguments, "train_limit: 0", "recipe.yaml:2: train_limit=0: must be at least 1"),
        (RunArguments, "sft_learning_rate: -1", "recipe.yaml:2: sft_learning_rate=-1.0: must be a"),
        (StepRoutingArguments, "hard_bonus: .inf", "recipe.yaml:2: hard_bonus=inf: must be at least 0"),
        (StepRoutingArguments, "train_caps: [1, .nan]", r"train_caps\[1\]=nan: must be at least 0 or .inf"),
        (StepRoutingArguments, "train_caps: []", r"recipe.yaml: train_caps=\[\]: give at least one"),
        (StepRoutingArguments, "step_limit: 0", "recipe.yaml:2: step_limit=0: must be at least 1"),
    ],
)
def test_a_recipe_names_the_line(tmp_path, cls, line, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{'task: a task' if cls is RunArguments else ''}\n{line}\n")
    with pytest.raises(RecipeError, match=words):
        load_recipe(cls, ["--config", str(path)])


def test_bf16_without_a_gpu_says_both_ways_out(tmp_path):
    from srpo.config import has_bf16_device

    if has_bf16_device():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="set use_cpu: true"):
        SRPOConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        SRPOConfig(output_dir=str(tmp_path), use_cpu=True, fp16=True)


def test_numbers_of_numpy_are_numbers():
    check_number("n", np.int64(3), at_least(1), whole=True)
    check_number("n", np.float32(0.5), between(0, 1))
    with pytest.raises(OutOfRange):
        check_number("n", np.float64("nan"), at_least(0))
    check_number("n", 10**400, at_least(0), whole=True)


def test_what_a_range_says():
    said = [at_least(1, -1), above(0), between(0, 1, open_high=True), at_least(0, math.inf)]
    assert list(map(str, said)) == ["at least 1 or -1", "above 0", "in [0, 1)", "at least 0 or .inf"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_a_command_line_has_a_range(script: str, monkeypatch: pytest.MonkeyPatch):
    """Walks over the parser of each script; numbers are read by `srpo.ranges.ranged`."""
    parsers: list[argparse.ArgumentParser] = []

    def recorded(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        parsers.append(self)
        raise SystemExit(0)

    module = importlib.import_module(script)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", recorded)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", recorded)
    text = Path(module.__file__ or "").read_text(encoding="utf-8")
    mains = [getattr(module, name) for name in ("evaluate_checkpoint", "compare", "main") if hasattr(module, name)]
    for main in mains if "Parser(" in text else []:
        with pytest.raises(SystemExit):
            main() if main.__code__.co_argcount == 0 else main([])
    for action in (action for parser in parsers for action in parser._actions):
        assert action.type not in (int, float), f"{script}: {action.dest} has no range"


@pytest.mark.parametrize("text", ["nan", "inf", "-0.1", "x"])
def test_a_bad_number_on_the_command_line_ends_with_one_line(text: str, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=ranged(at_least(0)))
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([f"--rate={text}"])
    assert caught.value.code == 2 and text in capsys.readouterr().err.splitlines()[-1]
    assert dataclasses.asdict(Budget(0.5, "usd"))["cap"] == 0.5
