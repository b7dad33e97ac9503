"""Evaluate a trained policy again: its own recipe, with other limits, other data, or on another machine.

    srpo evaluate outputs/quickstart/router --output_dir outputs/again --heldout_limit 100
    srpo evaluate user/router --config RECIPE --output_dir outputs/again

MODEL is the folder of a run, a checkpoint or a `start` in one, or a Hub id. The recipe is the one that lies there (or
above it), unless `--config` names another; every key of it can be set. Writes the same files as a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from srpo.cli import run, underscored
from srpo.own_policy import own_policy
from srpo.policy import load_policy
from srpo.recipe import RecipeError, load_run
from srpo.run.derived import made_from, mark, source, unmark
from srpo.run.files import EVALUATION, RECIPE
from srpo.run.results import check_results
from srpo.task import Evaluation
from srpo.train import concluded, evaluated


def main(argv: Sequence[str]) -> Evaluation:
    """Evaluate MODEL, `argv[0]`; returns the evaluation of it and of the baselines, on every process."""
    if not argv or argv[0].startswith("-"):
        raise RecipeError("command line: name the policy first: srpo evaluate MODEL --output_dir FOLDER")
    name, rest = argv[0], underscored(argv[1:])
    if not any(word.split("=")[0] == "--config" for word in rest):
        rest = ["--config", str(_recipe_of(name)), *rest]
    if not any(word.split("=")[0] == "--output_dir" for word in rest):
        raise RecipeError("command line: --output_dir is missing: name a folder for the results")
    task_class, recipe = load_run([*rest, "--model_name_or_path", name])
    arguments, how, args = recipe
    output = Path(args.output_dir)
    given = {key: value for key, value in recipe.given.items() if key != "output_dir"}
    values = made_from(policy=source(name), **given)
    check_results(output, EVALUATION, values)

    task = task_class(arguments, how, args)
    output.mkdir(parents=True, exist_ok=True)
    task.load(output)
    set_seed(args.seed)
    if own := own_policy(task, name):
        model, tokenizer = own.load(), None
    else:
        model, tokenizer = load_policy(name, args, 0, task.corpus)
        model = model.to(args.device)
    task.prepare(output, [])  # no training follows
    label = Path(name).name or name
    found = [evaluated(lambda share: task.evaluate(model, tokenizer, label, share)), evaluated(task.baselines)]
    main_process = PartialState().is_main_process
    if main_process:
        unmark(output / EVALUATION)
    evaluation, _ = concluded(task, found, output)
    if main_process:
        mark(output / EVALUATION, values)
    return evaluation


def _recipe_of(name: str) -> Path:
    for folder in (Path(name), *Path(name).parents[:1]):
        if (folder / RECIPE).is_file():
            return folder / RECIPE
    raise RecipeError(f"{name}: there is no {RECIPE} in it or above it: name the recipe with --config")


if __name__ == "__main__":
    import sys

    run(lambda: main(sys.argv[1:]))
