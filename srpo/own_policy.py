"""Policies that a task trains itself, because they are no language models: the same run around another loop.

A task that has some brings a method `own_policy`; whatever it names is trained, evaluated, reported, described and
pushed as everything else. It trains in seconds: every process does so alike, and there are no checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from srpo.recipe import Recipe, RecipeError, resolved_recipe

if TYPE_CHECKING:
    from srpo.task import Evaluation, Task

_KEYS = frozenset(
    "task model_name_or_path output_dir overwrite seed data_seed train_limit heldout_limit max_bad_share report_to "
    "bf16 fp16 use_cpu disable_tqdm push_to_hub hub_model_id hub_token hub_private_repo hub_revision "
    "hub_deadline".split()
)
"""Recipe keys of the run itself; `report_to` and `bf16` are read by `SRPOConfig` alone."""


class OwnPolicy(Protocol):
    """What `Task.own_policy` returns."""

    keys: Collection[str]
    """Further recipe keys that mean something for it."""

    def train(self, given: dict[str, Any]) -> tuple[Any, Any]:
        """After `Task.load`: the policy that RL starts from, and the trained one. `given`: the keys that were set."""

    def load(self) -> Any:
        """The policy that lies where the name says."""

    def save(self, policy: Any, folder: Path) -> None:
        """Weights and whatever loading needs."""


def own_policy(task: Any, name: str) -> OwnPolicy | None:
    """The task's own policy of this `model_name_or_path`, folder or Hub id; None: a language model."""
    find = getattr(task, "own_policy", None)
    return find(name) if find else None


def train_own(task: Task, own: OwnPolicy, recipe: Recipe) -> Evaluation:
    """`srpo.train.main` for a policy of the task's own.

    Raises:
        ValueError: a mistake in recipe or data; names a key that means nothing for this policy.
        NotPushed: all is done, and the Hub has not taken it.
    """
    from accelerate import PartialState
    from transformers import set_seed

    from srpo.hub.card import model_card
    from srpo.hub.files import LOADED
    from srpo.hub.hub import beside_card
    from srpo.hub.jobs import Pushes, push_of, repository
    from srpo.hub.upload import NotPushed
    from srpo.run.folder import claim, finish
    from srpo.run.processes import main_process_long
    from srpo.run.watch import part
    from srpo.run.whole import seal
    from srpo.task import START
    from srpo.train import concluded, evaluated, results_of
    from srpo.trainer.progress import phase

    _, how, args = recipe
    if unknown := sorted(set(recipe.given) - _KEYS - set(own.keys)):
        raise RecipeError(
            f"{', '.join(unknown)}: means nothing for model_name_or_path: {how.model_name_or_path}; take it out. "
            f"Of the training it knows {', '.join(sorted(own.keys))}"
        )
    claimed = claim(recipe, args.output_dir, overwrite=how.overwrite)
    task.load(claimed.notes)
    set_seed(args.seed)
    phase("train", f"{how.task}, {args.objective}: policy {how.model_name_or_path}, into {args.output_dir}")
    start, policy = own.train(recipe.given)  # what is wrong with it is said before the folder is touched
    output, main_process = claimed.take(), PartialState().is_main_process
    if main_process:
        own.save(policy, output)
        seal(output, only=LOADED)
    phase("evaluate", "the policy that RL starts from, and the trained one")
    parts = [
        evaluated(lambda share: task.evaluate(start, None, START, share)),
        evaluated(lambda share: task.evaluate(policy, None, args.objective, share)),
        evaluated(task.baselines),
    ]
    evaluation, table = concluded(task, parts, output)
    repo_id = repository(args) if args.push_to_hub else None
    if main_process:
        card = model_card(
            objective=args.objective,
            model_name=output.name,
            repo_id=repo_id,
            recipe=resolved_recipe(recipe),
            heldout_table=table,
            results=results_of(evaluation),
            **beside_card(output),
        )
        (output / "README.md").write_text(card, encoding="utf-8")
    pushed = True
    if repo_id is not None:
        with part("push", patient=True):
            push = push_of(args, repo_id, str(output))
            pushed = main_process_long(lambda: Pushes(str(output)).now(push) is not None)
    finish(output)
    phase("done", f"policy, evaluation and report are in {output}")
    if not pushed:
        raise NotPushed.of(output, str(repo_id))
    return evaluation
