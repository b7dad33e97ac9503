"""From completions to rewards: the world's columns go in, and what TRL makes of the functions is checked and counted.

completions -> world or episodes -> rows with columns -> TRL's reward functions -> lost ones out -> [B, functions]
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from srpo.columns import LOST_ROW
from srpo.objectives.advantages import REFERENCES
from srpo.run.watch import part
from srpo.trainer import rewards
from srpo.trainer.bad_numbers import BadSteps
from srpo.trainer.generation_step import GenerationStep
from srpo.trainer.late import lost_rows
from srpo.trainer.limits import without_trl_warning
from srpo.trainer.metrics import CompletionsTable, Losses, gathered_metrics
from srpo.types import World


class Scoring:
    """Of one trainer.

    Args:
        world: in place of an environment; None: there is none.
        add_metrics: (in training, numbers by name), to be logged.
        episodes: there is an environment, which counts its lost rollouts itself.
        late: reward functions have a deadline.
    """

    def __init__(
        self,
        world: World | None,
        losses: Losses,
        bad_steps: BadSteps,
        table: CompletionsTable,
        accelerator: Accelerator,
        add_metrics: Callable[[bool, Mapping[str, float]], None],
        episodes: bool,
        late: bool,
    ) -> None:
        self.world, self.episodes, self.late = world, episodes, late
        self.losses, self.bad_steps, self.table = losses, bad_steps, table
        self.accelerator, self._add_metrics = accelerator, add_metrics

    def rows(
        self, step: GenerationStep, rows: Sequence[Any], completions: Sequence[Any], taken: Collection[str]
    ) -> list[dict[str, Any]]:
        """Those of a step as reward functions see them; `step` gets the columns.

        Args:
            completions: texts, or messages.
            taken: names that no column may have.
        """
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        step.opened = step.opened or [""] * len(texts)
        step.rows = rows
        with part("world"):
            step.columns, repaired = rewards.columns_of(step, texts, self.world, taken)
        if repaired := gather_object(repaired):
            self._add_metrics(step.training, {"records/repaired": len(repaired)})
            self.table.say(f"texts of the world are no valid Unicode, and were repaired: {repaired[0]}", step.number)
        whole = rewards.rows_with_columns(rows, step.columns, self._may_lose)
        step.references = [row.get(REFERENCES) for row in whole]
        return whole

    @property
    def _may_lose(self) -> bool:
        return self.world is not None or self.episodes

    def quiet(self, rows: Sequence[Mapping[str, Any]]) -> AbstractContextManager[None]:
        """Around TRL's scoring of `rows`."""
        lost = any(row.get(LOST_ROW) is not None for row in rows)
        return without_trl_warning() if lost or self.late else nullcontext()

    def settled(
        self, step: GenerationStep, scored: Tensor, functions: Sequence[Any], weights: Tensor, ends: Collection[int]
    ) -> Tensor:
        """[all B, functions] of all processes as advantages may read them: NaN where a function does not apply, where
        a rollout is lost, and where the number was none. `step` gets its own summed rewards, and what was cut short.

        Args:
            scored: what TRL has gathered, [all B, functions].
            weights: of the functions.
            ends: ids that end a completion by themselves.
        """
        count = len(step.rows)
        scored = rewards.of_models(scored, functions)
        if self._may_lose or self.late:
            gone, counted = lost_rows(step, self.losses, self.episodes, self.table.args.output_dir)
            self._add_metrics(step.training, counted)
            # A lost rollout has no reward, whatever a reward model says of it.
            scored = scored.masked_fill(torch.tensor(gone, device=scored.device).unsqueeze(1), torch.nan)
        step.truncated = rewards.cut_short(step, ends)
        start = self.accelerator.process_index * count
        mine = slice(start, start + count)
        scored, step.bad_rewards = self.bad_steps.rewards(scored, mine)
        step.rewards = rewards.summed(scored[mine], weights)
        self._add_metrics(step.training, gathered_metrics(step.columns, count, step.importance))
        return scored
