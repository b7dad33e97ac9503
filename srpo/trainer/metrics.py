"""What a person needs to trust a run: metrics of the world's columns, and alarms in words."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from srpo.columns import CALLS, FORMAT_ERROR, MEMBERS
from srpo.types import CORRECT, COST, ROUTE

NO_ROUTE = "none"
ENTROPY_FLOOR = 0.05
LENGTH_FACTOR = 3.0
MEMBER_SHARE = 0.98
FEW_CALLS = 0.02
REWARD_DROP = 0.2


def world_metrics(columns: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Metrics of one batch of gathered columns (see `srpo.types`); a column that is absent adds nothing.

    route/share/<member>  share of completions routed there; "none" = no valid action
    route/entropy         nats over the members, completions without a valid action left out
    cost/per_query_usd    mean cost; correct/mean: mean over the graded completions
    invalid/share         share with something wrong in the form (column `format_error`)
    calls/per_query       mean number of calls of an episode (column `calls`)
    calls/share/<member>  share of all calls (column `members`: who was asked, in order); calls/entropy: in nats
    """
    metrics: dict[str, float] = {}
    if calls := [float(n) for n in columns.get(CALLS, ()) if n is not None]:
        metrics["calls/per_query"] = sum(calls) / len(calls)
    if asked := Counter(str(name) for names in columns.get(MEMBERS, ()) for name in names or ()):
        metrics.update({f"calls/share/{name}": n / asked.total() for name, n in sorted(asked.items())})
        metrics["calls/entropy"] = sum(-n / asked.total() * math.log(n / asked.total()) for n in asked.values())
    if routes := columns.get(ROUTE):
        counts = Counter(NO_ROUTE if route is None else str(route) for route in routes)
        metrics["route/share/" + NO_ROUTE] = 0.0
        metrics.update({f"route/share/{name}": n / len(routes) for name, n in sorted(counts.items())})
        valid = [n for name, n in counts.items() if name != NO_ROUTE]
        metrics["route/entropy"] = sum(-n / sum(valid) * math.log(n / sum(valid)) for n in valid)
    for column, name in ((COST, "cost/per_query_usd"), (CORRECT, "correct/mean")):
        if values := [float(v) for v in columns.get(column, ()) if v is not None]:
            metrics[name] = sum(values) / len(values)
    if errors := [bool(error) for error in columns.get(FORMAT_ERROR, ()) if error is not None]:
        metrics["invalid/share"] = sum(errors) / len(errors)
    return metrics


class Alarms:
    """Says once, in words, that a run has been degenerate for `interval` logged steps in a row."""

    def __init__(self, interval: int, warn: Callable[[str], None]):
        self.interval = interval
        self._warn = warn
        self._streak: Counter[str] = Counter()
        self._said: set[str] = set()
        self._first: dict[str, float] = {}
        self._best: float | None = None

    def observe(self, name: str, degenerate: bool, message: str) -> None:
        """Count one step of the condition `name`; warn at its `interval`-th step in a row, once per run."""
        self._streak[name] = self._streak[name] + 1 if degenerate else 0
        if self._streak[name] >= self.interval and name not in self._said:
            self._said.add(name)
            self._warn(f"{message} ({self._streak[name]} logged steps in a row)")

    def observe_step(self, metrics: Mapping[str, float], max_length: int) -> None:
        """Check one training step's averaged metrics, under the names they are logged with."""
        entropy, length = metrics.get("entropy"), metrics.get("completions/mean_length")
        if entropy is not None:
            first = self._first.setdefault("entropy", entropy)
            self.observe(
                "entropy",
                entropy < ENTROPY_FLOOR * first,
                f"The policy's entropy fell from {first:.3g} to {entropy:.3g}: it hardly explores any more. "
                "Lower the learning rate or raise the temperature",
            )
        if length is not None:
            first = self._first.setdefault("length", length)
            collapsed = length * LENGTH_FACTOR < first or (length > 0.95 * max_length and first < 0.95 * max_length)
            self.observe(
                "length",
                collapsed,
                f"Completions went from {first:.0f} to {length:.0f} tokens: short demonstrations breed short answers, "
                "and endless ones hit max_completion_length. Look at the completions table",
            )
        self.observe(
            "flat",
            metrics.get("frac_reward_zero_std", 0.0) >= 1.0,
            "All completions of every group got the same reward: there is nothing to learn from. Check the reward "
            "functions, the difficulty of the data, and that temperature > 0",
        )
        self.observe(
            "format",
            # An episode that made no call may have answered by itself.
            metrics.get("route/share/" + NO_ROUTE, 0.0) > 0.5 and "calls/per_query" not in metrics,
            "More than half of the completions hold no valid action. Warm-start the policy on the action format",
        )
        # Calls of several turns say more than the one route of a completion, where both are known.
        prefix, of = ("calls/share/", "calls") if "calls/entropy" in metrics else ("route/share/", "queries")
        shares = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
        top = max((member for member in shares if member != NO_ROUTE), key=lambda m: shares[m], default=None)
        self.observe(
            "one_member",
            top is not None and shares[top] >= MEMBER_SHARE,
            f"{top} takes {shares.get(top or '', 0.0):.0%} of all {of}: the policy has stopped routing",
        )
        self.observe(
            "no_calls",
            metrics.get("calls/per_query", 1.0) <= FEW_CALLS,
            f"The policy makes {metrics.get('calls/per_query', 0.0):.2f} calls per query: it answers by itself and "
            "has stopped asking the pool. Lower the cost weight, or warm-start it on answers that needed a call",
        )
        if "srpo/failed_share" in metrics:
            self.observe(
                "no_teacher",
                metrics["srpo/failed_share"] > 0 and metrics.get("srpo/teacher_available", 0.0) == 0.0,
                "No failed completion had a correct sibling or feedback, so nothing is distilled. Raise "
                "num_generations, warm-start the policy, or let the rewards give textual feedback",
            )

    def observe_evaluation(self, reward: float) -> None:
        """Compare a held-out reward with the best one so far."""
        self._best = reward if self._best is None else max(self._best, reward)
        if self._best - reward > REWARD_DROP * max(abs(self._best), 1e-8) and "best" not in self._said:
            self._said.add("best")
            self._warn(
                f"The held-out reward is {reward:.3f}, it was {self._best:.3f} at the best evaluation: the run may be "
                "collapsing; keep that checkpoint (load_best_model_at_end, metric_for_best_model: eval_reward)"
            )
