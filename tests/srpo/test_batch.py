"""Two numbers make the batch: prompts per step and completions per prompt, on any number of processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srpo import SRPOConfig
from srpo.recipe import RecipeError, load_run
from srpo.run.batch import BatchMistake, accumulation, as_launched, batch_line, check_batch, settle_batch

RECIPE = "task: query_routing\nuse_cpu: true\nbf16: false\noutput_dir: out\nnum_generations: 8\n"


def sizes(**given: Any) -> SimpleNamespace:
    keys = "prompts_per_step gradient_accumulation_steps steps_per_generation generation_batch_size"
    return SimpleNamespace(**{**dict.fromkeys(keys.split()), "num_iterations": 1, **given})


# 32 prompts x 8 completions = 256; 256 / (4 x 8) = 8, and so on.
@pytest.mark.parametrize(("processes", "size", "micro"), [(1, 4, 64), (8, 4, 8), (32, 4, 2), (32, 8, 1), (1, 256, 1)])
def test_accumulation_follows_from_the_processes(processes: int, size: int, micro: int) -> None:
    args = sizes(prompts_per_step=32, num_generations=8, per_device_train_batch_size=size)
    settle_batch(args, processes)
    assert args.gradient_accumulation_steps == micro
    assert size * processes * micro == 256
    settle_batch(args, processes)  # a copy of a settled configuration settles again
    assert args.gradient_accumulation_steps == micro


def test_without_it_everything_is_as_in_transformers() -> None:
    args = sizes(num_generations=8, per_device_train_batch_size=3)
    settle_batch(args, 5)
    assert args.gradient_accumulation_steps == 1
    assert accumulation(sizes(gradient_accumulation_steps=7), 2) == 7


@pytest.mark.parametrize(
    ("given", "processes", "words"),
    [
        ({"per_device_train_batch_size": 4}, 3, "256 completions cannot be shared by 3 processes: .* multiple of 3$"),
        ({"per_device_train_batch_size": 12}, 8, "shared by 8 processes with .* 12: set that to 8$"),
        ({"gradient_accumulation_steps": 4}, 8, "steps 4 contradicts prompts_per_step 32, which takes 8 on 8"),
        ({"steps_per_generation": 8}, 8, "leave it out beside prompts_per_step, or say in generation_batch_size"),
        ({"generation_batch_size": 384}, 8, "generation_batch_size 384 must be a multiple of the 256 completions"),
    ],
)
def test_contradictions_are_one_sentence(given: dict[str, Any], processes: int, words: str) -> None:
    args = sizes(**{"prompts_per_step": 32, "num_generations": 8, "per_device_train_batch_size": 4, **given})
    with pytest.raises(BatchMistake, match=words):
        settle_batch(args, processes)


def test_a_recipe_and_what_trl_makes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"{RECIPE}objective: grpo\nprompts_per_step: 8\ngeneration_batch_size: 256\n")
    _, (_, _, args) = load_run([str(path), "--per_device_train_batch_size", "4"])
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (16, 64)
    assert batch_line(args, 1) == (
        "8 prompts x 8 completions a step = 1 process x 4 at a time x 16 micro-batches; a batch of rollouts of "
        "32 prompts feeds 4 optimiser steps"
    )
    with pytest.raises(RecipeError, match=r"r\.yaml: gradient_accumulation_steps 3 contradicts prompts_per_step 8"):
        load_run([str(path), "--gradient_accumulation_steps", "3"])


def test_the_same_recipe_on_other_processes() -> None:
    def launched(**more: Any) -> tuple[int, int, int]:
        args = sizes(num_generations=8, per_device_train_batch_size=4, generation_batch_size=256, **more)
        as_launched(args, 8)
        return args.gradient_accumulation_steps, args.steps_per_generation, args.generation_batch_size

    assert launched(prompts_per_step=8, steps_per_generation=64) == (2, 8, 256)
    assert launched(gradient_accumulation_steps=16, steps_per_generation=64) == (16, 64, 2048)


def test_what_is_assigned_later_is_checked_again(tmp_path: Path) -> None:
    args = SRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, prompts_per_step=2, per_device_train_batch_size=4
    )
    assert args.gradient_accumulation_steps == 4 and args.steps_per_generation == 4
    args.num_generations = 4
    with pytest.raises(BatchMistake, match=r"2 x num_generations 4 = 8 completions, but .* 4 x 1 processes x .* = 16"):
        args.check()


def test_processes_that_do_not_know_of_one_another() -> None:
    """As in `mpirun` of a program that accelerate does not recognise: the sizes would be those of one process."""
    args = sizes(prompts_per_step=4, num_generations=8, per_device_train_batch_size=4)
    settle_batch(args, 2)
    args.world_size = 1
    with pytest.raises(BatchMistake, match=r"= 32 completions, but .* 4 x 1 processes x .* 4 = 16"):
        check_batch(args)
