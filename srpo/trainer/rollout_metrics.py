"""What a batch of rollouts is summed up to: lengths, turns and stops, and whether too many were lost."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from srpo.rollout.loop import TURNS
from srpo.types import LOST, ROUTE, STOPS, Stop, Trajectory

TRUNCATED: tuple[Stop, ...] = ("turns", "tokens", "deadline")
"""Stops that cut a trajectory short. "budget" is the world's own ruling, as final as "done"."""


@dataclass(frozen=True)
class Account:
    """What the other processes need to know of one rollout."""

    prompt_tokens: int
    policy_tokens: int
    stop: Stop
    turns: int
    cause: str | None
    """Of a lost rollout: member and error."""


def account(prompt_tokens: int, policy_tokens: int, trajectory: Trajectory) -> Account:
    cause = None
    if trajectory.stop == "lost":
        cause = str(trajectory.columns.get(LOST) or "no reason given")
        member = trajectory.columns.get(ROUTE)
        cause = cause if member is None or str(member) in cause else f"{member}: {cause}"
    return Account(prompt_tokens, policy_tokens, trajectory.stop, trajectory.columns[TURNS], cause)


def rollout_metrics(rows: Sequence[Account], kept: Sequence[bool]) -> dict[str, float]:
    """Metrics of one batch of all ranks; lengths count the policy's tokens, `kept` says which rows are trained on.

    completions/*           TRL's names; "clipped" and "terminated" go by the stop reason
    rollout/turns           mean turns of the policy
    rollout/stop/<reason>   share of the rollouts that ended so
    rollout/dropped_share   lost, or in a group that lost too many
    """
    n = len(rows)
    lengths = [row.policy_tokens for row in rows]
    whole = [row.policy_tokens for row in rows if row.stop not in (*TRUNCATED, "lost")] or [0]
    return {
        "completions/mean_length": sum(lengths) / n,
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(row.stop in TRUNCATED for row in rows) / n,
        "completions/mean_terminated_length": sum(whole) / len(whole),
        "completions/min_terminated_length": min(whole),
        "completions/max_terminated_length": max(whole),
        "rollout/turns": sum(row.turns for row in rows) / n,
        "rollout/dropped_share": kept.count(False) / n,
        **{f"rollout/stop/{stop}": sum(row.stop == stop for row in rows) / n for stop in STOPS},
    }


class Losses:
    """Counts batches in a row of which more than `share` was lost; `verdict` is the reason to stop, if any."""

    def __init__(self, share: float, batches: int):
        self.share = share
        self.batches = batches
        self.streak = 0
        self.verdict: str | None = None

    def observe(self, rows: Sequence[Account]) -> str | None:
        """Take one batch of all ranks; what was lost in it, in words, most frequent cause first."""
        causes = Counter(row.cause for row in rows if row.stop == "lost")
        lost = sum(causes.values())
        self.streak = self.streak + 1 if lost > self.share * len(rows) else 0
        if not lost:
            return None
        most = "; ".join(f"{n} x {cause}" for cause, n in causes.most_common(3))
        summary = f"{lost} of {len(rows)} rollouts of the batch were lost: {most}"
        if self.streak >= self.batches and self.verdict is None:
            self.verdict = (
                f"more than {self.share:.0%} of the rollouts were lost in {self.streak} batches in a row; the last: "
                f"{summary}"
            )
        return summary
