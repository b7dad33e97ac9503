"""How good is a think/route agent? EM, F1, cost, calls and reward per question, beside members asked once.

Everything is an array over the same questions; intervals are 95 % percentile bootstraps over questions with shared
resamples (`routers.evaluation.statistics`), so differences are paired. Who writes the final answer is stated in every
table: the agent writes its own; under the single members, random, best per family and oracle the member's reply *is*
the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from routers.evaluation.report import aligned
from routers.evaluation.statistics import PER_QUERIES, Estimate, estimate, resamples, summarise_seeds

AGENT_EVALUATION = "agent_evaluation.json"
METRICS = ("em", "f1", "cost", "calls", "reward")
"""Per question: exact match and token F1 (0 to 1), USD, calls of the pool, reward as in training."""
ANSWERER = (
    "The agent writes its own final answer. For single members, random, best per family and oracle, one member is "
    "asked the question itself, once, and its reply is the final answer."
)
_HEADER = ("", "EM", "95 % interval", "F1", "95 % interval", "$ / 1k", "calls", "reward", "95 % interval")


@dataclass(frozen=True)
class Line:
    """One way of answering: ``values`` holds per metric of `METRICS` one number per question."""

    name: str
    kind: str
    """policy, member, random, baseline or oracle."""
    values: dict[str, list[float]]

    def __post_init__(self) -> None:
        lengths = {len(self.values[metric]) for metric in METRICS}
        if len(lengths) != 1 or not all(np.isfinite(self.values[metric]).all() for metric in METRICS):
            raise ValueError(f"{self.name}: every metric needs one finite number per question")


@dataclass(frozen=True)
class AgentEvaluation:
    """Lines on the same questions; the first is the policy's."""

    questions: list[str]
    """Ids, in order."""
    families: list[str]
    """Of each question: its dataset, or its kind."""
    lines: list[Line]
    members: dict[str, float]
    """Share of the policy's calls that went to each member."""
    stops: dict[str, float]
    """Share of the policy's episodes that ended in each way."""
    lost: int = 0
    """Questions that the pool failed on; they are left out of every line."""
    note: str = ""

    @property
    def policy(self) -> Line:
        return self.lines[0]

    def write(self, folder: str | Path) -> Path:
        """Write `agent_evaluation.json`; returns its path."""
        path = Path(folder, AGENT_EVALUATION)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: str | Path) -> AgentEvaluation:
        """Read `agent_evaluation.json` of a folder.

        Raises:
            FileNotFoundError: there is none.
        """
        data = json.loads(Path(folder, AGENT_EVALUATION).read_text(encoding="utf-8"))
        return cls(**{**data, "lines": [Line(**line) for line in data["lines"]]})

    def text(self, before: AgentEvaluation | None = None, markdown: bool = False) -> str:
        """The table, the policy by family, whom it asked and how its episodes ended, and the gain over ``before``."""
        draws = resamples(len(self.questions))
        lines = [self.policy, *([] if before is None else [before.policy]), *self.lines[1:]]
        table = aligned([_HEADER, *(_cells(line, draws) for line in lines)], markdown)
        parts = [table, self._by_family(markdown)]
        asked = ", ".join(f"{name} {share:.1%}" for name, share in self.members.items())
        ended = ", ".join(f"{name} {share:.1%}" for name, share in self.stops.items())
        parts.append(f"Calls of {self.policy.name}: {asked or 'none'}. Ends: {ended}. {self.note}".strip())
        if before is not None:
            parts.append(gains_text([self], [before]))
        return "\n\n".join([*parts, ANSWERER])

    def _by_family(self, markdown: bool) -> str:
        labels = np.array(self.families)
        rows: list[tuple[str, ...]] = [("family", "questions", *_HEADER[1:])]
        for family in dict.fromkeys(self.families):
            chosen = np.flatnonzero(labels == family)
            part = Line(family, "policy", {m: [self.policy.values[m][i] for i in chosen] for m in METRICS})
            name, *cells = _cells(part, resamples(len(chosen)))
            rows.append((name, str(len(chosen)), *cells))
        return aligned(rows, markdown)


def single_lines(
    names: Sequence[str],
    values: Mapping[str, Mapping[str, np.ndarray]],
    families: Sequence[str],
    best: Mapping[str, str] | None = None,
) -> list[Line]:
    """Lines of asking one member once: every member, a random one (exact mean), the best per family, the oracle.

    Args:
        names: of the members.
        values: member -> metric -> ``[questions]``.
        families: of the questions.
        best: family -> the member that earned most on that family in *training*; None: no such line.
    """
    stacked = {m: np.stack([np.asarray(values[name][m], dtype=float) for name in names]) for m in METRICS}
    lines = [_line(name, "member", {m: stacked[m][i] for m in METRICS}) for i, name in enumerate(names)]
    lines.append(_line("random", "random", {m: stacked[m].mean(0) for m in METRICS}))
    columns = np.arange(len(families))
    if best:
        fallback = max(set(best.values()), key=list(best.values()).count)
        chosen = np.array([list(names).index(best.get(family, fallback)) for family in families])
        lines.append(_line("best per family", "baseline", {m: stacked[m][chosen, columns] for m in METRICS}))
    oracle = stacked["reward"].argmax(0)
    lines.append(_line("oracle", "oracle", {m: stacked[m][oracle, columns] for m in METRICS}))
    return lines


def best_per_family(
    names: Sequence[str], rewards: Mapping[str, np.ndarray], families: Sequence[str]
) -> dict[str, str]:
    """Family -> the member with the highest mean reward on it; give training questions."""
    labels = np.array(families)
    return {
        family: max(names, key=lambda name: float(np.asarray(rewards[name])[labels == family].mean()))
        for family in dict.fromkeys(families)
    }


def gains(runs: Sequence[AgentEvaluation], starts: Sequence[AgentEvaluation]) -> dict[str, Estimate]:
    """Per metric run minus start, paired by seed and question, with a bootstrap over seeds and questions.

    Raises:
        ValueError: not as many starts as runs, or on other questions.
    """
    if len(runs) != len(starts) or any(run.questions != runs[0].questions for run in (*runs, *starts)):
        raise ValueError("every run needs its start, all on the same questions")
    differences = [
        {m: np.array(run.policy.values[m]) - np.array(start.policy.values[m]) for m in METRICS}
        for run, start in zip(runs, starts, strict=True)
    ]
    return summarise_seeds(differences).estimates


def gains_text(runs: Sequence[AgentEvaluation], starts: Sequence[AgentEvaluation]) -> str:
    """`gains` in a sentence."""
    found = gains(runs, starts)
    parts = [
        f"{label} {found[m].value * scale:+{spec}} [{found[m].low * scale:+{spec}}, {found[m].high * scale:+{spec}}]"
        for m, label, scale, spec in (
            ("reward", "reward", 1.0, ".3f"),
            ("em", "EM", 1.0, ".3f"),
            ("f1", "F1", 1.0, ".3f"),
            ("cost", "$ per 1k questions", float(PER_QUERIES), ".4f"),
            ("calls", "calls per question", 1.0, ".2f"),
        )
    ]
    return (
        f"{runs[0].policy.name} minus {starts[0].policy.name}, {len(runs)} seed{'s' * (len(runs) > 1)} x "
        f"{len(runs[0].questions)} questions, paired, 95 % intervals: " + ", ".join(parts) + "."
    )


def seeds_table(groups: Mapping[str, Sequence[AgentEvaluation]], markdown: bool = False) -> str:
    """One row per recipe, the mean over its seeds with intervals over seeds and questions, above the other lines.

    Args:
        groups: recipe -> its evaluations, all on the same questions.
    """
    rows: list[tuple[str, ...]] = [(*_HEADER, "reward of each seed")]
    for name, runs in groups.items():
        found = summarise_seeds([{m: np.array(run.policy.values[m]) for m in METRICS} for run in runs])
        seeds = " ".join(f"{value:.3f}" for value in found.per_seed["reward"])
        rows.append((*_numbers(name, found.estimates), seeds))
    first = next(iter(groups.values()))[0]
    draws = resamples(len(first.questions))
    rows += [(*_cells(line, draws), "") for line in first.lines if line.kind != "policy"]
    return aligned(rows, markdown)


def _line(name: str, kind: str, values: Mapping[str, np.ndarray]) -> Line:
    return Line(name, kind, {metric: [float(x) for x in values[metric]] for metric in METRICS})


def _cells(line: Line, draws: np.ndarray) -> tuple[str, ...]:
    return _numbers(line.name, {m: estimate(np.array(line.values[m]), draws) for m in METRICS})


def _numbers(name: str, found: Mapping[str, Estimate]) -> tuple[str, ...]:
    def interval(value: Estimate) -> str:
        return f"[{value.low:.3f}, {value.high:.3f}]"

    return (
        name,
        f"{found['em'].value:.3f}",
        interval(found["em"]),
        f"{found['f1'].value:.3f}",
        interval(found["f1"]),
        f"{found['cost'].value * PER_QUERIES:.4f}",
        f"{found['calls'].value:.2f}",
        f"{found['reward'].value:.3f}",
        interval(found["reward"]),
    )
