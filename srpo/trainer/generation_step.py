"""What is known of one generation batch, from its rows to its advantages: written by one hook, read by the next."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from srpo.types import Columns, Trajectory


@dataclass
class GenerationStep:
    """Everything is this rank's, one entry per completion, unless it says otherwise."""

    rows: Sequence[Any] = ()
    """Dataset rows, a group's one after the other."""
    training: bool = True
    number: int = 0
    """Optimiser steps made before."""
    part: int = 0
    """Micro-steps of the coming optimiser step that were made before: it may take several generation batches. In an
    evaluation: its batches before."""

    # `_generate`
    opened: Sequence[str] = ()
    """The think tag that the prompt has opened, or ""."""
    trajectories: list[Trajectory] | None = None
    """Episodes of an environment; None without one."""
    ahead: bool = False
    """Whether it was played while the batch before it trained, by the weights before that."""
    choices: Tensor | None = None
    """[B, T, A] ids that were allowed, -1 at the padding (`srpo.teacher.masked_decisions`); None: no token was
    restricted, on any rank."""
    importance: Tensor | None = None
    """[B] the policy's probability of a completion over that by which it was drawn (`srpo.rollout.each_of`); None: the
    policy drew."""
    trained: Tensor | None = None
    """[B, T] 1 at the policy's tokens, in the padding of the completions; None: others wrote none."""
    recorder: Any = None
    """R3: what the sampler of this process reports experts to; None: it reports none."""
    expert_rows: Sequence[Tensor] | None = None
    """R3: expert ids that the sampler chose, ragged (`srpo.replay.expert_table`)."""
    expert_ids: Tensor | None = None
    """The same, or those of R2, in the padding of the batch."""
    old_pass_due: bool = False
    """Whether the next scoring pass is the old policy's."""
    scored: bool = False
    """Whether old policy and reference have scored it: a later pass belongs to a loss."""

    # `_calculate_rewards`
    prompts: list[Any] = field(default_factory=list)
    """As the policy saw them."""
    completion_ids: Sequence[Any] = ()
    columns: Columns = field(default_factory=dict)
    """The world's, and feedback of a reward function."""
    references: list[Any] = field(default_factory=list)
    """[R_S, R_L] of the row, where it has them (`srpo.objectives.advantages`)."""
    truncated: list[bool] = field(default_factory=list)
    """Which completions a limit ended; they never count as correct and are shown to nobody."""
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    """[B], summed with their weights; NaN: not scored by any function."""
    late: list[str | None] = field(default_factory=list)
    """Why a completion is lost to a reward function (`reward_deadline`), or None; empty: no function has said so."""
    bad_rewards: Tensor | None = None
    """[B] bool: a reward was NaN or infinite; None: of no rank (`srpo.trainer.bad_numbers`)."""

    def lose(self, causes: Sequence[str | None]) -> None:
        """One reward function's `late`; the first cause of a completion stays."""
        self.late = [old or new for old, new in zip(self.late or [None] * len(causes), causes, strict=True)]

    def named(self, seed: int) -> str:
        """What the seeds of all its draws begin with; no other generation batch of the run of this `seed` has it."""
        return f"{seed}:{'' if self.training else 'eval-'}{self.number}.{self.part}"
