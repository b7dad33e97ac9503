"""What a person needs to trust a run: metrics of columns and rollouts, alarms in words, and the completions table.

The table is written so that nothing in it and nothing around it can end a run. TRL writes the same table (parquet, W&B
or trackio, the console) inside `log`, after the step has been paid for, and raises at the first value that a file
format has no type for. Here every column is tried; one that cannot be written is written as text, and the values are
counted (`records/as_text`). A writer that fails says so once and is counted (`records/failed`).
"""

import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.utils import is_rich_available, logging
from trl.trainer import grpo_trainer
from trl.trainer.utils import print_prompt_completions_sample

from srpo.columns import CALLS, FORMAT_ERROR, MEMBERS, too_deep
from srpo.rollout.loop import TURNS
from srpo.types import CORRECT, COST, LOST, ROUTE, STOPS, Stop, Trajectory

logger = logging.get_logger(__name__)

NO_ROUTE = "none"
ENTROPY_FLOOR = 0.05
KL_CEILING = 1.0
LENGTH_FACTOR = 3.0
MEMBER_SHARE = 0.98
FEW_CALLS = 0.02
REWARD_DROP = 0.2
TRUNCATED: tuple[Stop, ...] = ("turns", "tokens", "deadline")
"""Stops that cut a trajectory short. "budget" is the world's own ruling, as final as "done"."""


def world_metrics(columns: Mapping[str, Sequence[Any]], importance: Sequence[float] = ()) -> dict[str, float]:
    """Metrics of one batch of gathered columns (see `srpo.types`); a column that is absent adds nothing. Those of
    routes, cost, correctness and form are the policy's: means by the completions' `importance`, where some was given.

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
        counts: Counter[str] = Counter()
        for route, weight in zip(routes, importance or [1.0] * len(routes), strict=True):
            counts[NO_ROUTE if route is None else str(route)] += weight  # type: ignore[assignment]
        total = sum(counts.values())
        metrics["route/share/" + NO_ROUTE] = 0.0
        metrics.update({f"route/share/{name}": n / total for name, n in sorted(counts.items())})
        valid = [n for name, n in counts.items() if name != NO_ROUTE and n]
        metrics["route/entropy"] = sum(-n / sum(valid) * math.log(n / sum(valid)) for n in valid)
    means = (
        (COST, "cost/per_query_usd", float),
        (CORRECT, "correct/mean", float),
        (FORMAT_ERROR, "invalid/share", bool),
    )
    for column, name, kind in means:
        if not (values := columns.get(column)):
            continue
        known = [(kind(v), w) for v, w in zip(values, importance or [1.0] * len(values), strict=True) if v is not None]
        if mass := sum(w for _, w in known):
            metrics[name] = sum(value * w for value, w in known) / mass
    return metrics


def gathered_metrics(
    columns: Mapping[str, Sequence[Any]], rows: int, importance: Tensor | None = None
) -> dict[str, float]:
    """`world_metrics` of all ranks' columns; `rows` and `importance` of this rank."""
    weights = gather_object(importance.tolist()) if importance is not None else []
    names = sorted(set(gather_object(list(columns))))  # a rank may lack a column, but not a collective
    return world_metrics({name: gather_object(list(columns.get(name, [None] * rows))) for name in names}, weights)


def as_the_policy_drew(
    metrics: Mapping[str, list[float]], logs: Mapping[str, Any], rewards: Tensor, importance: Tensor
) -> None:
    """TRL's last numbers of rewards in `metrics`, weighted: mean and std of what the policy itself would draw.

    Args:
        logs: TRL's table, whose last rows are the batch.
        rewards, importance: [all B].
    """
    weights = importance.double().cpu()
    functions = {f"rewards/{name}/": list(values)[-len(weights) :] for name, values in logs["rewards"].items()}
    for name, values in {"reward": rewards.tolist(), **functions}.items():
        scored = torch.tensor(values, dtype=torch.float64)
        known = scored.isfinite()
        mass = weights[known].sum()
        mean = (weights * scored)[known].sum() / mass
        std = ((weights * (scored - mean) ** 2)[known].sum() / mass).sqrt()
        ends = ("", "_std") if name == "reward" else ("mean", "std")
        metrics[name + ends[0]][-1], metrics[name + ends[1]][-1] = mean.item(), std.item()


class Alarms:
    """Says once, in words, that a run has been degenerate for `interval` logged steps in a row.

    Attributes:
        said: name of an alarm -> its words.
    """

    def __init__(self, interval: int, warn: Callable[[str], None]):
        self.interval = interval
        self._warn = warn
        self._streak: Counter[str] = Counter()
        self.said: dict[str, str] = {}
        self._first: dict[str, float] = {}
        self._best: float | None = None

    def observe(self, name: str, degenerate: bool, message: str) -> None:
        """Count one step of the condition `name`; warn at its `interval`-th step in a row, once per run."""
        self._streak[name] = self._streak[name] + 1 if degenerate else 0
        if self._streak[name] >= self.interval:
            self._say(name, f"{message} ({self._streak[name]} logged steps in a row)")

    def _say(self, name: str, words: str) -> None:
        if name not in self.said:
            self.said[name] = words
            self._warn(words)

    def observe_log(self, numbers: Mapping[str, float], training: bool, max_length: int) -> None:
        """Check what is logged of a training step, or of an evaluation."""
        if training:
            self.observe_step(numbers, max_length)
        elif "eval_reward" in numbers:
            self.observe_evaluation(numbers["eval_reward"])

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
        kl = metrics.get("kl", 0.0)
        self.observe(
            "kl",
            kl > KL_CEILING,
            f"The policy is {kl:.3g} nats per token away from the reference policy: it forgets what it could. Raise "
            "beta, or lower the learning rate",
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
        if self._best - reward > REWARD_DROP * max(abs(self._best), 1e-8):
            self._say(
                "heldout",
                f"The held-out reward is {reward:.3f}, it was {self._best:.3f} at the best evaluation: the run may be "
                "collapsing; keep that checkpoint (save_strategy: best)",
            )


@dataclass(frozen=True)
class Account:
    """What the other processes need to know of one rollout."""

    prompt_tokens: int
    policy_tokens: int
    stop: Stop
    turns: int
    cause: str | None
    """Of a lost rollout: member and error."""
    usd: float = 0.0


def account(prompt_tokens: int, policy_tokens: int, trajectory: Trajectory) -> Account:
    cause = None
    if trajectory.stop == "lost":
        cause = str(trajectory.columns.get(LOST) or "no reason given")
        member = trajectory.columns.get(ROUTE)
        cause = cause if member is None or str(member) in cause else f"{member}: {cause}"
    usd = float(trajectory.columns.get(COST) or 0.0)
    return Account(prompt_tokens, policy_tokens, trajectory.stop, trajectory.columns[TURNS], cause, usd)


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
        self._causes: Sequence[str | None] = ()
        self._before = 0

    def observe(self, causes: Sequence[str | None], again: bool = False) -> str | None:
        """Take one batch of all ranks; what was lost in it, in words, most frequent cause first.

        Args:
            causes: of each rollout that was lost; None: it was not.
            again: the last batch once more, of which rewards have lost more.
        """
        if again:
            self.streak = self._before
            causes = [old or new for old, new in zip(self._causes, causes, strict=True)]
        self._causes, self._before = causes, self.streak
        found = Counter(cause for cause in causes if cause is not None)
        lost = found.total()
        self.streak = self.streak + 1 if lost > self.share * len(causes) else 0
        if not lost:
            return None
        most = "; ".join(f"{n} x {cause}" for cause, n in found.most_common(3))
        summary = f"{lost} of {len(causes)} rollouts of the batch were lost: {most}"
        if self.streak >= self.batches and self.verdict is None:
            self.verdict = (
                f"more than {self.share:.0%} of the rollouts were lost in {self.streak} batches in a row; the last: "
                f"{summary}"
            )
        return summary


class CompletionsTable:
    """Writes what TRL's `log` would."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.failed = 0
        self._said: frozenset[str] = frozenset()

    @contextmanager
    def in_place_of_trls(self, trainer: Any, logs: dict[str, float]) -> Iterator[None]:
        """Around TRL's `log`, which would write the table too: what was `take`n before it is written after it."""
        ours, step = trainer.log_completions, trainer.state.global_step
        rollouts = trainer.heldout is None or trainer.model.training
        wanted = ours and rollouts and trainer.accelerator.is_main_process
        table = self.take(trainer._logs, step, logs) if wanted else {}
        trainer.log_completions = False
        try:
            yield
        finally:
            trainer.log_completions = ours
        if table:
            self.write(table, trainer._logs, step)

    def take(self, kept: Mapping[str, Any], step: int, logs: dict[str, float]) -> dict[str, list[Any]]:
        """The table of what TRL has `kept` in its `_logs`; what could not be written as it is is counted in `logs`."""
        strip = grpo_trainer.strip_images_from_messages
        rows = len(kept["prompt"])
        columns = {
            "step": [step] * rows,
            "prompt": [strip(messages) for messages in kept["prompt"]],
            "completion": [strip(messages) for messages in kept["completion"]],
            **kept["rewards"],
            **kept["extra"],
            "advantage": kept["advantages"],
        }
        # A column that was first logged in a later batch than others of the table has no value for their rows.
        table, texts = writable_table(
            {name: [None] * (rows - len(values)) + list(values)[-rows:] for name, values in columns.items()}
        )
        if texts:
            logs["records/as_text"] = float(sum(texts.values()))
            self.say(f"columns {', '.join(texts)} hold values that no table can, which are written as text", step)
        if self.failed:
            logs["records/failed"] = float(self.failed)
        return table

    def write(self, table: Mapping[str, list[Any]], kept: Mapping[str, Any], step: int) -> None:
        """To every place that the settings name; a failure is counted."""
        frame = pd.DataFrame(table)
        folder = os.path.join(self.args.output_dir, "completions")
        path = os.path.join(folder, f"completions_{step:05d}.parquet")

        def show() -> None:
            print_prompt_completions_sample(
                table["prompt"],
                table["completion"],
                {name: table[name] for name in kept["rewards"]},
                table["advantage"],
                step,
                self.args.num_completions_to_print,
                extra={name: table[name] for name in kept["extra"]},
            )

        self._attempt("writing the parquet file", step, lambda: _write_parquet(frame, folder, path))
        if is_rich_available():
            self._attempt("printing completions", step, show)
        reports, images = self.args.report_to or (), kept["images"]
        if "wandb" in reports and grpo_trainer.wandb.run is not None:
            report = self._reporter(grpo_trainer.wandb, frame, images)
            self._attempt("the completions table of wandb", step, report)
        if "trackio" in reports:
            report = self._reporter(grpo_trainer.trackio, frame, images)
            self._attempt("the completions table of trackio", step, report)

    def _reporter(self, backend: Any, frame: pd.DataFrame, images: Any) -> Callable[[], None]:
        def report() -> None:
            shown = frame
            if images:
                pictures = [[backend.Image(image) for image in found] if found else [] for found in images]
                shown = pd.concat([shown, pd.Series(pictures, name="image")], axis=1)
            if self.args.log_unique_prompts:
                shown = shown[~shown["prompt"].astype(str).duplicated()]  # prompts may be lists of messages
            backend.log({"completions": backend.Table(dataframe=shown)})

        return report

    def _attempt(self, what: str, step: int, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self.failed += 1
            self.say(f"{what} failed, and the run goes on: {type(error).__name__}: {error}", step)

    def say(self, message: str, step: int) -> None:
        """A warning, once for each text before its colon."""
        kind = message.split(":")[0]
        if kind not in self._said:
            self._said |= {kind}
            logger.warning("Completions table, step %d: %s", step, message)


def writable_table(table: Mapping[str, Sequence[Any]]) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """The columns as parquet can hold them, and for those that it cannot, how many values became text.

    A column of a table has one type. Where its values have none in common, or none that parquet knows, every value but
    None is written as text: a text as it is (lone surrogates escaped), anything else as JSON, or as Python shows it.
    """
    found: dict[str, list[Any]] = {}
    texts: dict[str, int] = {}
    for name, values in table.items():
        found[name] = list(values)
        if not _has_type(name, found[name]):
            found[name] = [_as_text(value) for value in values]
            texts[name] = sum(old is not new for old, new in zip(values, found[name], strict=True))
    return found, texts


def _has_type(name: str, values: list[Any]) -> bool:
    if any(too_deep(value) for value in values):
        return False
    try:
        pq.write_table(pa.Table.from_pandas(pd.DataFrame({name: values})), io.BytesIO())
    except Exception:  # pyarrow raises a dozen kinds, the values' own methods any
        return False
    return True


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value.encode("utf-8")
            return value
        except UnicodeEncodeError:
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        return json.dumps(value)
    except Exception:
        try:
            return repr(value).encode("utf-8", "backslashreplace").decode("utf-8")
        except Exception:
            return f"<{type(value).__name__}>"


def _write_parquet(frame: pd.DataFrame, folder: str, path: str) -> None:
    os.makedirs(folder, exist_ok=True)
    draft = f"{path}.part"
    frame.to_parquet(draft)
    os.replace(draft, path)  # a full disk leaves no half of a table
