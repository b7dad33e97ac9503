"""Step routing as a task of the one run: profile -> demonstrations -> BoPO -> held-out evaluation.

OUTPUT holds besides what every run writes: `task/` (profiles and rules, which runs may share: `task_dir`),
`demonstrations/`, `profiles.parquet` (with what the policy solved, for a next run), and with live executors
`spending_N.json`, the books of process N that `max_cost_usd` holds for. What was played is kept: a run that was
stopped goes on with the same command, in training from its checkpoints (`--resume_from_checkpoint`).

"BoPO-style": the paper (arXiv 2602.21227) has no public code or formula; see srpo/objectives/advantages.py.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.boundary import make_boundary_reward
from routers.data.table import spread
from routers.evaluation.episodes import Episodes
from routers.tasks.step_routing.arguments import VALIDATION, StepRoutingArguments
from srpo.run.derived import source
from srpo.run.steps import NoSteps, check_rows_of_a_batch
from srpo.task import START, Corpus, Ids, Planned, RunArguments, Share
from srpo.types import CORRECT, Columns, Row

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from routers.tasks.step_routing.environment import StepRoutingEnvironment
    from routers.tasks.step_routing.profiles import BoundaryProfile
    from routers.tasks.step_routing.settings import StepSettings
    from routers.tasks.step_routing.sft_rows import Demonstration
    from srpo.config import SRPOConfig


class StepRouting:
    """`srpo.task.Task` for agents whose steps are taken by a cheap or an expensive executor, within a budget."""

    Arguments = StepRoutingArguments
    episodes = Episodes
    sft_options: Mapping[str, Any] = {"mean": "rows"}

    def __init__(self, arguments: StepRoutingArguments, run: RunArguments, config: SRPOConfig):
        from routers.tasks.step_routing.world import StepWorld

        self.arguments, self.run, self.config = arguments, run, config
        self.tasks = StepWorld(arguments, run.train_limit, run.heldout_limit, config.eval_strategy != "no")
        self._begun: list[dict[str, Any]] | None = None
        self._given: Mapping[str, BoundaryProfile] | None = None
        self._environment: StepRoutingEnvironment | None = None

    @property
    def settings(self) -> StepSettings:
        """What serving must know."""
        from routers.tasks.step_routing.world import step_settings

        return step_settings(self.arguments, self.run, self.config)

    def load(self, notes: Path) -> None:
        """What evaluating needs; what only training needs is looked at with the rows, before anything is paid."""
        self._notes = notes
        self.tasks.check_parts()
        self.tasks.executors()

    @property
    def validation(self) -> list[str]:
        return list(self.tasks.choosing())

    def _begin(self) -> list[dict[str, Any]]:
        """A row per cap and training task that begins."""
        from srpo.quarantine import Quarantine

        if self._begun is None:
            tasks, caps = len(self.tasks.train_tasks()), len(self.arguments.train_caps)
            what = f"train_tasks ({tasks} tasks at {caps} train_caps)"
            check_rows_of_a_batch(tasks * caps, self.config, what)
            if self.run.start_from is not None:
                _check_told_alike(self.settings, self.run.start_from)
            if self.arguments.profiles is not None:
                self._given = self.tasks.given_profiles(Path(self.arguments.profiles))
            bad = Quarantine("training tasks", self._notes / "quarantine_train.jsonl", self.run.max_bad_share)
            self._begun = self.tasks.rows(self.tasks.train_tasks(), self.arguments.train_caps, bad)
        return self._begun

    def plan(self) -> Planned:
        from routers.tasks.step_routing.spending import phases, worst_usd

        task, world = self.arguments, self.tasks
        found = phases(world, self.config, self._swept, 1)
        bounds = [high for _, high in worst_usd(world, found)] if task.live else [0.0] * len(found)
        [(training, usd)] = [(p, b) for p, b in zip(found, bounds, strict=True) if p.name == "training"]
        held_out = sum(len(types) for types in world.heldout().values())
        members = f"{len(task.executors)} executors, {'live' if task.live else 'scripted'}"
        expected = None
        if task.profiles is not None:
            given = world.given_profiles(Path(task.profiles)).values()
            expected = sum(one.cost_small + one.cost_large for one in given) / 2 / max(len(given), 1)
        return Planned(
            len(world.train_tasks()) * len(task.train_caps),
            [members, f"{held_out} held-out tasks"],
            calls=task.step_limit,
            calls_beside=sum(phase.most for phase in found) - training.most,
            usd_expected=expected,
            expected_if="midway between the profiles' small and large runs",
            usd_most=usd / max(training.most, 1) * task.step_limit,
            usd_beside=sum(bounds) - usd,
        )

    @property
    def _swept(self) -> int:
        """Episodes at most for the demonstrations of a row."""
        demonstrated = self.run.sft_epochs > 0 and self.run.start_from is None
        return self.arguments.profile_runs + self.arguments.sft_sweep - 1 if demonstrated else 0

    def corpus(self) -> Corpus:
        """The prompts, and the words that are one token each. Few words and two actions need little."""
        texts = [row["prompt"][0]["content"] for row in self._begin()]
        shape = {"hidden": 96, "layers": 2, "heads": 4, "intermediate": 192}
        return Corpus(texts, [*self.arguments.labels, *self.settings.style.words], vocab_size=600, shape=shape)

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        settings = self.settings
        return [{**row, "prompt": settings.cleaned(row["prompt"], tokenizer)} for row in self._begin()]

    def made_from(self) -> tuple[dict[str, Any], dict[str, Any]]:
        task = self.arguments
        rows = "train_caps budget_unit tail_calls on_empty observation labels tau_easy tau_large".split()
        start = {
            **self.tasks.profile_settings(),
            **{name: getattr(task, name) for name in ("train_tasks", *rows)},
            "train_content": source(task.train_tasks),
            "profiles": source(task.profiles),
            "told": asdict(self.settings),
            **{f"demonstrations: {key}": value for key, value in asdict(task.synthesis()).items()},
        }
        heldout = (
            "heldout_tasks heldout_caps heldout_temperature cost_weight hard_bonus cost_norm gate_cost_on_success"
        )
        evaluated = {name: getattr(task, name) for name in heldout.split()}
        return start, {**evaluated, "heldout_content": [source(which) for which in task.heldout_tasks]}

    def prepare(self, output: Path, rows: list[Row]) -> list[Row]:
        """Profiles of the tasks of these rows (none: no training follows) and of the held-out ones."""
        from accelerate import PartialState

        from routers.tasks.step_routing.evaluate import choose_rules, estimate_advantages
        from routers.tasks.step_routing.spending import Money, estimate, phases
        from routers.tasks.step_routing.world import describe_rows
        from srpo.trainer.progress import phase

        phase("prepare", "tasks are played by each executor alone, and by rules")
        world, task, args, state = self.tasks, self.arguments, self.config, PartialState()
        self._output, self._folder = output, Path(task.task_dir or output / "task")
        self._money = Money(world.pool(), args.max_cost_usd, output / f"spending_{state.process_index}.json")
        if rows and task.live and state.is_main_process:
            found = phases(world, args, self._swept, state.num_processes)
            print(estimate(world, found, args.max_cost_usd), flush=True)
        with state.main_process_first():  # the others read what the first has written
            named = {row["task"] for row in rows}
            self._profiled = self._given or {}
            if rows and self._given is None:
                some = {name: kind for name, kind in world.train_tasks().items() if name in named}
                how = (task.train_tasks, some, self.run.train_limit, self._folder)
                with self._money.phase("profiling"):
                    self._profiled = world.profiles("train", *how)
            if rows and self.validation:
                with self._money.phase("profiling of validation tasks"):
                    self._chosen_on = {VALIDATION: world.choosing_profiles(self._folder)}
            if rows:
                estimate_advantages(world, self._profiled, self._folder)
            with self._money.phase("profiling of held-out tasks"):
                self._heldout = {
                    name: world.profiles(name, which, world.heldout()[name], self.run.heldout_limit, self._folder)
                    for name, which in task.heldout_sets().items()
                }
            with self._money.phase("rules on validation tasks"):
                self._rules = choose_rules(world, self._folder)
        self._rows: list[Row] = list(world.completed(rows, self._profiled))
        if rows and state.is_main_process:
            print(describe_rows(task.reward(), self._rows), flush=True)
        return self._rows

    def sft_rows(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[Ids]:
        from accelerate import PartialState

        from routers.tasks.step_routing.sft_rows import encode

        with PartialState().main_process_first(), self._money.phase("demonstrations"):
            chosen = self._demonstrations(self._output / "demonstrations")
        return [encode(demonstration, self.settings, tokenizer) for demonstration in chosen]

    def _demonstrations(self, folder: Path) -> list[Demonstration]:
        """Balanced demonstrations on the training rows, at their caps; made once, in `folder`.

        Raises:
            ValueError: the folder was made with other settings.
            NoSteps: there is none, so that "start" would be an untrained policy.
        """
        from routers.tasks.step_routing import sft_rows
        from routers.tasks.step_routing.world import check_folder

        task, how, seed = self.arguments, self.arguments.synthesis(), self.config.seed
        names = list(dict.fromkeys(row["task"] for row in self._rows))
        chosen_names = {names[i] for i in spread(len(names), self.run.sft_limit)}
        rows = [row for row in self._rows if row["task"] in chosen_names]
        content = json.dumps(rows, sort_keys=True, default=str).encode()  # with all that they read of the profiles
        made_with = {**asdict(how), "seed": seed, "rows": hashlib.sha256(content).hexdigest()}
        check_folder({**self.tasks.profile_settings(), **made_with}, folder)
        if not (folder / "train.parquet").exists():

            def seeds(row: Mapping[str, Any]) -> list[str]:
                return [f"bosft/{seed}/{k}/{row['query_id']}" for k in range(task.profile_runs)]

            play, partial = self.tasks.player((task.train_tasks, self.run.train_limit)), folder / "runs.partial"
            found = sft_rows.demonstrations(rows, how, seeds, play, partial)
            sft_rows.write_dataset(sft_rows.balance(found, how, random.Random(seed)), folder, task.executors)
            partial.unlink(missing_ok=True)
        if not (chosen := sft_rows.read_dataset(folder)):
            raise NoSteps(
                f"there is nothing to imitate: no boundary run and none of {how.sweep} sweeps solved one of "
                f"{len(rows)} training rows; raise sft_sweep or profile_runs, or set sft_epochs: 0"
            )
        return chosen

    def save(self, folder: Path) -> None:
        made_from = {"train_tasks": source(self.arguments.train_tasks), "catalogue": source(self.arguments.catalogue)}
        self.settings.save(folder, made_from)

    def world(self) -> None:
        return None

    def environment(self, tokenizer: PreTrainedTokenizerBase) -> StepRoutingEnvironment:
        self._environment = self.tasks.environment()
        return self._environment

    def allowed_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        return None

    def rewards(self) -> tuple[list[Any], list[float]]:
        return [make_boundary_reward(self.arguments.reward())], [1.0]

    @staticmethod
    def correctness(rewards: Tensor, columns: Columns) -> Tensor:
        """Correct means that the task was fulfilled; the reward also holds the cost."""
        return rewards.new_tensor([score is not None and score >= 1 for score in columns[CORRECT]]).bool()

    def callbacks(self) -> list[TrainerCallback]:
        from routers.tasks.step_routing.spending import TrainingMoney

        assert self._environment is not None  # `environment` comes first
        return [TrainingMoney(self._money, self._environment)]

    def finish(self, trainer: Any, output: Path) -> None:
        """Profiles with what the policy solved, for a next run; stops here where the money is spent.

        Raises:
            PhaseStopped: says what is kept.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        from routers.tasks.step_routing.profiles import observe, write_profiles

        assert self._environment is not None
        self._money.take_back()
        outcomes = gather_object([self._environment.outcomes()])
        if PartialState().is_main_process:
            observed = observe(self._profiled.values(), outcomes)
            write_profiles(observed, output / "profiles.parquet", self.tasks.profile_settings())
        self._money.check(
            f"The policy of step {trainer.state.global_step} is saved: --resume_from_checkpoint with its checkpoint "
            f"in {output} goes on, srpo evaluate {output} evaluates it."
        )

    def evaluate(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, share: Share
    ) -> Episodes:
        return self._played(policy, tokenizer, name, share, self._heldout)

    def validate(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, share: Share) -> Episodes:
        return self._played(policy, tokenizer, VALIDATION, share, self._chosen_on)

    def _played(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        share: Share,
        sets: Mapping[str, Mapping[str, BoundaryProfile]],
    ) -> Episodes:
        from routers.tasks.step_routing.evaluate import play_policy

        self._money.take_back()
        self._money.check("What was played is kept.")
        self._money.share()
        with self._money.phase(f"evaluation of {name}"):
            return play_policy(
                policy,
                tokenizer,
                self.tasks,
                self.settings,
                sets,
                name=name,
                kind="start" if name == START else "policy",
                share=share,
                seed=self.config.seed,
                temperature=self.arguments.heldout_temperature,
            )

    def baselines(self, share: Share) -> Episodes:
        from routers.tasks.step_routing.evaluate import play_rules

        self._money.take_back()
        self._money.share()
        with self._money.phase("rules"):
            return play_rules(self.tasks, self._heldout, share, self._folder, self._rules)

    def report(self, evaluation: Episodes, output: Path) -> str:
        from routers.evaluation.report import report

        if total := self._money.total():
            print(total, flush=True)
        return report(evaluation, output, title=f"Step routing: {self.arguments.environment}")


def _check_told_alike(settings: StepSettings, policy: str) -> None:
    """ValueError where `start_from` was trained to be told something else than this recipe tells it."""
    from routers.router import ROUTER_FILE
    from srpo.rollout.shared import find_file

    found = find_file(policy, ROUTER_FILE)
    then = None if found is None else type(settings).load(found.parent)
    for name in ("environment", "executors", "labels", "observation", "observation_tokens", "unit"):
        if then is not None and getattr(then, name) != getattr(settings, name):
            raise ValueError(
                f"start_from {policy} was trained with {name}={getattr(then, name)!r}, the recipe says "
                f"{getattr(settings, name)!r}: set that, or give another start_from"
            )
