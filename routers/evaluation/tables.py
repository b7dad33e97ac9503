"""What an evaluation says, as tables and lines: the same for plain text, Markdown and the HTML report."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from routers.evaluation.episodes import CACHES, LOST, Episodes, Kind
from routers.evaluation.frontier import apgr, brier, calibration_error, cpt
from routers.evaluation.statistics import LEFT_OUT, METRICS, PER_ITEMS, Estimate, Metric, Paired, Reference, sets

INTERVAL = "95 % interval"
NOTE = (
    "Intervals are 95 %, over items and seeds; differences are paired by item and seed. Costs hold the policy's own "
    "tokens where they have a price."
)
CPT = (0.5, 0.8, 0.95)
FRONTIER = (
    "AIQ: mean score over all costs from the cheapest to the dearest member, of the best mixture of settings",
    "mixing members: drawing lots between those that turn out best on these very items",
    "APGR: mean share of the way from the cheapest to the best member's score, over the way in cost; 0.5 is a coin",
    "CPT: the share of that cost at which so much of the score's way is gone; AUC: area under the steps",
    "regret: to the best of each item; ECE, Brier: of the foretold score; ms: of one decision; -: not defined",
)
LEFT_OUT_NOTE = (
    "Gain: reward above the best single member's, of the oracle's. Left out: fitted without a member, which is then "
    "described by its outcomes on some training queries; mean over the members."
)
CACHES_NOTE = (
    "Saved: against the same tokens without a cache. Lost by switches: what a prompt cost more because another "
    "member's cache held it."
)
FAMILIES, SENT = "By family", "Sent where"
"""Titles of sections that the page shows as pictures."""
LONGEST = 48
"""Characters of a router's name that are shown."""
TO_SHOW = 12
"""At most this many families are columns of a table; the report's heat map shows all."""


@dataclass(frozen=True)
class Section:
    """A table, whose first row is its header and first column names, and lines below it."""

    title: str
    rows: Sequence[tuple[str, ...]] = ()
    lines: Sequence[str] = ()
    bold: Collection[tuple[int, int]] = ()
    """Cells (row, column) that hold the best of their column."""


def sections(paired: Paired) -> list[Section]:
    """Everything about one set of items, the most important first."""
    parts = [make(paired) for make in (_main, _gains, _beyond_mixing, _frontier, _left_out, _caps, _caches)]
    parts += [_groups(paired, "By difficulty", paired.difficulty), _groups(paired, FAMILIES, paired.families)]
    parts.append(_sent(paired))
    return [part for part in parts if len(part.rows) > 1 or part.lines]


def render(episodes: Episodes, title: str = "", markdown: bool = False, more: Sequence[Section] = ()) -> str:
    """The sections of every set, and `more`, as text that reads well as it is."""
    found = sets(episodes)
    text = [f"## {title}" if markdown else title] if title else []
    for name, paired in found.items():
        if len(found) > 1 or name:
            text.append(f"### {name}" if markdown else f"== {name} ==")
        text += _told(sections(paired), markdown)
    text += _told(more, markdown)
    note = str(episodes.header.get("note", ""))
    return "\n\n".join([*text, f"{NOTE} {note}".strip()]) + "\n"


def _told(found: Iterable[Section], markdown: bool) -> list[str]:
    text = []
    for section in found:
        if section.title:
            text.append(f"**{section.title}**" if markdown else section.title)
        if section.rows:
            text.append(aligned(section.rows, markdown, section.bold))
        text += ["\n".join(f"- {line}" if markdown else line for line in section.lines)] if section.lines else []
    return text


def aligned(rows: Sequence[tuple[str, ...]], markdown: bool, bold: Collection[tuple[int, int]] = ()) -> str:
    """A table with its header in the first row; the first column is left-aligned, the others right-aligned.

    `bold`: cells (row, column) that Markdown shows so.
    """
    if markdown:
        strong = "**{}**".format
        rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
        rows = [
            tuple(strong(cell) if (i, j) in bold else cell for j, cell in enumerate(row)) for i, row in enumerate(rows)
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
    rule = ["-" * widths[0], *("-" * (w - markdown) + ":" * markdown for w in widths[1:])]
    lines.insert(1, f"| {' | '.join(rule)} |" if markdown else "  ".join(rule))
    return "\n".join(lines)


def shown(paired: Paired) -> list[str]:
    """Routers as the table lists them: the strongest baseline; where there are families of rules, each at its best
    setting, and the members, by reward; policies and their starts; the rest by reward; the oracle.

    Other settings of a rule are not listed, nor those of a router that was played without one, too; the picture shows
    them all.
    """

    def by_reward(names: Iterable[str]) -> list[str]:
        return sorted(filter(paired.played, names), key=lambda name: -paired.mean(name, "reward"))

    rules = [rule.router for rule in paired.rules]
    strongest = [reference.router for reference in paired.references[-1:]]
    policies = filter(paired.played, [*paired.listed("policy"), *paired.listed("start")])
    first = [*strongest, *by_reward([*rules, *paired.of_kind("member")] if rules else []), *policies]
    oracle = [name for name in paired.listed("oracle") if paired.played(name)]
    rest = [name for name in paired.routers if name not in {*first, *oracle} and not paired.curves[name]]
    return list(dict.fromkeys([*first, *by_reward(rest), *oracle]))


def named(paired: Paired, name: str) -> str:
    """A router's name in a table, not longer than a line; of the members, the cheapest and the dearest are marked."""
    members = sorted(paired.of_kind("member"), key=lambda member: paired.mean(member, "usd"))
    short = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}...{name[-LONGEST // 2 :]}"
    if len(members) < 2 or name not in (members[0], members[-1]):
        return short
    return f"{short} ({'cheapest' if name == members[0] else 'dearest'})"


def header(metric: Metric, paired: Paired) -> str:
    """Of a column; what the score and an item are called is the evaluation's own."""
    return metric.header.format(score=paired.header.get("score", "score"), items=items_of(paired))


def items_of(paired: Paired) -> str:
    """What items are called: queries, questions, episodes."""
    item = str(paired.header.get("item", "item"))
    return item[:-1] + "ies" if item.endswith("y") else item + "s"


def interval(value: Estimate, metric: Metric, difference: bool = False) -> str:
    show = metric.show_difference if difference else metric.show
    return f"[{show(value.low)}, {show(value.high)}]"


def _metrics(paired: Paired, routers: Sequence[str]) -> list[Metric]:
    once = paired.frame["calls"].max() <= 1  # then valid turns say it
    return [m for m in METRICS if paired.has(m.column, routers) and not (once and m.column == "calls")]


def _main(paired: Paired) -> Section:
    names = shown(paired)
    metrics, several = _metrics(paired, names), any(len(paired.values(name, "score")) > 1 for name in names)
    top = [""]
    for metric in metrics:
        top += [header(metric, paired), *([INTERVAL] if metric.interval else [])]
    rows = [(*top, "entropy", *(["reward of each seed"] if several else []))]
    for name in names:
        cells = [named(paired, name)]
        for metric in metrics:
            known = paired.has(metric.column, [name])
            found = paired.estimate(name, metric.column)
            cells += [metric.show(found.value) if known else "", *([interval(found, metric)] * metric.interval)]
        entropy = paired.entropy(name)
        cells.append("" if entropy is None else f"{entropy:.2f}")
        if several:
            seeds = paired.values(name, "reward").mean(axis=1)
            cells.append(" ".join(f"{value:.3f}" for value in seeds) if len(seeds) > 1 else "")
        rows.append(tuple(cells))
    better = [0, *(value for metric in metrics for value in (metric.better, *([0] * metric.interval)))]
    how = [f"Of each family of rules, its best setting: {paired.rules[0].how}."] if paired.rules else []
    return Section("", rows, how, bold=_best(rows, better, paired))


def _best(rows: Sequence[tuple[str, ...]], better: Sequence[int], paired: Paired) -> set[tuple[int, int]]:
    """Cells with the best number of their column as it is shown (1: the highest, -1: the lowest), oracles left out."""
    found: set[tuple[int, int]] = set()
    for column, sign in enumerate(better):
        cells = {i: row[column] for i, row in enumerate(rows) if i and row[0] not in paired.of_kind("oracle")}
        values = {i: sign * float(one[0]) for i, cell in cells.items() if (one := re.match(r"[+-]?[\d.]+", cell))}
        found |= {(i, column) for i, value in values.items() if sign and value == max(values.values())}
    return found


def _gains(paired: Paired) -> Section:
    """Policies minus whom they must beat."""
    compared = [m for m in _metrics(paired, paired.policies) if m.compared]
    metrics = [m for m in compared if m.column == "reward"] + [m for m in compared if m.column != "reward"]
    metrics = [m for m in metrics if paired.frame[m.column].nunique() > 1]
    rows = [("", *(cell for metric in metrics for cell in (header(metric, paired), INTERVAL)))]
    for name in paired.policies:
        start, first = paired.start_of(name), paired.policies[0]
        others = [start] if start else []
        others += [Reference("the first policy", first)] if name != first else []
        for reference in [*others, *paired.references]:
            how = f"; {reference.how}" if reference.how else ""
            cells = [f"{name} minus {reference.label} ({reference.router}{how})"]
            for metric in metrics:
                paid_alike = metric.column != "reward" or paired.one_reward(name, reference.router)
                if not paid_alike or not paired.has(metric.column, [reference.router]):
                    cells += ["", ""]
                    continue
                found = paired.difference(name, reference.router, metric.column)
                cells += [metric.show_difference(found.value), interval(found, metric, difference=True)]
            rows.append(tuple(cells))
    return Section("Gains", rows if len(rows) > 1 and metrics else [])


def _beyond_mixing(paired: Paired) -> Section:
    """What policies reach beyond drawing lots at their own cost: the strongest opponent of each first."""
    score, curves = METRICS[0], paired.frontiers
    kinds: tuple[Kind, ...] = ("policy", "start", "learned")
    routers = [name for kind in kinds for name in paired.listed(kind) if paired.played(name)]
    if not curves or not routers:
        return Section("")
    rules = any(paired.curves[name] for name in paired.of_kind("rule"))
    dearest = max(paired.of_kind("member"), key=lambda name: paired.mean(name, "usd"), default="")
    ratios = ["cost of the dearest", "score of the dearest"] if rules and dearest else []
    rows = [("", f"{header(score, paired)} at equal cost", INTERVAL, *ratios)]
    for name in routers:
        gains = {curve: paired.beyond_mixing(name, points) for curve, points in curves.items()}
        shares = [f"{paired.ratio(name, dearest, of).value:.1%}" for of in ("usd", "score")] if ratios else []
        for curve, gain in sorted(gains.items(), key=lambda found: found[1].value):
            shown_gain = (score.show_difference(gain.value), interval(gain, score, True))
            rows.append((f"{name} beyond {curve}", *shown_gain, *shares))
    return Section("Beyond mixing", rows)


def _frontier(paired: Paired) -> Section:
    """Every router over all its settings, between the cheapest and the dearest member (see `evaluation.frontier`)."""
    kinds = {name: paired.routers[points[0]] for name, points in paired.curves_of.items()}
    if not paired.ends or not {"policy", "learned", "rule"} & {*kinds.values()}:
        return Section("")
    area = {name: paired.aiq(name).value for name in kinds}
    names = sorted(kinds, key=lambda name: (kinds[name] == "oracle", -area[name] if area[name] == area[name] else 0.0))
    best = next((name for name in names if kinds[name] == "policy"), "")
    score, reward = METRICS[0], next(metric for metric in METRICS if metric.column == "reward")
    rows = [
        (
            "", "settings", f"AIQ ({header(score, paired)})", INTERVAL, "above mixing members", INTERVAL,
            *([f"above {best}", INTERVAL] if best else []), "APGR", *(f"CPT {share:.0%}" for share in CPT), "AUC",
            f"regret ({header(score, paired)})", "regret (reward)", "ECE", "Brier", "ms",
        )
    ]  # fmt: skip
    for name in names:
        points, own = paired.curves_of[name], name if name in paired.routers else ""
        found, curve = paired.aiq(name), paired.recovery(name)
        cells = [name, str(len(points)), _or_dash(score.show, found.value), _or_dash(interval, found, score)]
        for other in ("mixing members", *([best] if best else [])):
            gain = paired.aiq(name, other) if other != name else Estimate(math.nan, 0.0, 0.0)
            cells += [_or_dash(score.show_difference, gain.value), _or_dash(interval, gain, score, True)]
        cells.append(_or_dash("{:.3f}".format, apgr(curve)))
        cells += [_or_dash("{:.0%}".format, cpt(curve, share)) for share in CPT]
        cells.append(_or_dash("{:.3f}".format, paired.auc(points)))
        for metric in (score, reward):
            lost = paired.regret(own, metric.column) if own else None
            cells.append(_or_dash(metric.show_difference, lost.value if lost else math.nan).lstrip("+"))
        told = own and paired.has("expected", [own])
        pair = (paired.values(own, "expected"), paired.values(own, "score")) if told else None
        cells += [f"{error(*pair):.3f}" if pair else "-" for error in (calibration_error, brier)]
        seconds = paired.mean(own, "seconds") if own else 0.0
        cells.append(_or_dash("{:.2f}".format, 1000 * seconds or math.nan))
        rows.append(tuple(cells))
    kept = [j for j in range(len(rows[0])) if not j or any(row[j] != "-" for row in rows[1:])]
    better = {"AIQ": 1, "APGR": 1, "AUC": 1, "CPT": -1, "regret": -1, "ECE": -1, "Brier": -1, "ms": -1}
    rows = [tuple(row[j] for j in kept) for row in rows]
    signs = [better.get(cell.split(" ")[0], 0) for cell in rows[0]]
    return Section("Frontier", rows, [*FRONTIER, *_reads(paired)], _best(rows, signs, paired))


def _reads(paired: Paired) -> list[str]:
    """What the policies of a frontier read queries by, where they chose it, and by how many seeds."""
    chosen: dict[str, Counter[str]] = {}
    for name, what in paired.header.get("reads", {}).items():
        chosen.setdefault(what, Counter())[name.partition(", seed ")[0]] += 1
    told = {
        what: ", ".join(f"{name} (seeds: {count})" for name, count in names.items()) for what, names in chosen.items()
    }
    return [f"{what}: read by {names}" for what, names in told.items()]


def _left_out(paired: Paired) -> Section:
    """What routers keep when each member in turn is seen for the first time."""
    names = [name for name in paired.routers if LEFT_OUT.format(name) in paired.routers and paired.played(name)]
    if not names or not paired.has_oracle:
        return Section("")
    share = Metric("reward", "", ".1%")
    top = ("share of the oracle's gain", "fitted on all", INTERVAL, "each left out", INTERVAL, "kept", INTERVAL)
    rows: list[tuple[str, ...]] = [top]
    for name in names:
        new = LEFT_OUT.format(name)
        found = (paired.gained(name), paired.gained(new), paired.gained(new, of=name))
        cells = ((_or_dash(share.show, one.value), _or_dash(interval, one, share)) for one in found)
        rows.append((name, *(cell for pair in cells for cell in pair)))
    unable = paired.header.get("need_every_member", [])
    told = f"{len(unable)} cannot route to a member that they were not fitted on: {', '.join(unable)}"
    return Section("Members left out", rows, [LEFT_OUT_NOTE, *([told] if unable else [])])


def _or_dash(show: Callable[..., str], value: Any, *args: Any) -> str:
    """What is not defined is a dash."""
    number = value.value if isinstance(value, Estimate) else value
    return "-" if math.isnan(number) else show(value, *args)


def _caps(paired: Paired) -> Section:
    score = METRICS[0]
    rows: list[tuple[str, ...]] = [("", "cap", header(score, paired), INTERVAL, "used of the cap", "violations")]
    for name in paired.of_kind("policy", "start", "rule"):
        for cap in paired.caps(name):
            found = paired.estimate(name, "score", cap)
            used, violated = (
                paired.values(name, m, cap) if paired.has(m, [name]) else None for m in ("used", "violated")
            )
            cells = [score.show(found.value), interval(found, score), "" if used is None else f"{used.mean():.0%}"]
            rows.append((name, f"{cap:g}", *cells, "" if violated is None else f"{violated.sum():.0f}"))
    return Section("Under a cap", rows)


def _caches(paired: Paired) -> Section:
    """What members' prompt caches did for each router: see `CACHES`."""
    members = [name.removeprefix(CACHES[0]) for name in paired.frame if name.startswith(CACHES[0])]
    top = ("", "member", f"prompt tokens / 1k {items_of(paired)}", "cached")
    rows: list[tuple[str, ...]] = [(*top, *(f"$ {what} / 1k" for what in ("saved", "lost by switches")))]
    for name in shown(paired):
        for member in members:
            # an episode that could not even begin has none
            sums = [PER_ITEMS * np.nan_to_num(paired.values(name, what + member)).mean() for what in CACHES]
            if sums[0]:
                share, usd = sums[1] / sums[0], (f"{value:.4f}" for value in sums[2:])
                rows.append((named(paired, name), member, f"{sums[0]:,.0f}", f"{share:.1%}", *usd))
    return Section("Prompt caches", rows, [CACHES_NOTE] if len(rows) > 1 else [])


def _groups(paired: Paired, title: str, groups: Sequence[str]) -> Section:
    names = sorted(set(groups) - {""})
    if not 1 < len(names) <= TO_SHOW:
        return Section("")
    compared = {reference.router for reference in paired.references}
    routers = [name for name in shown(paired) if paired.routers[name] in ("policy", "start") or name in compared]
    rows = [(header(METRICS[0], paired), *(f"{name} ({list(groups).count(name)})" for name in names))]
    for router in routers:
        found = paired.by(router, groups)
        rows.append((router, *(METRICS[0].show(found[name]) for name in names)))
    return Section(title, rows)


def _sent(paired: Paired) -> Section:
    lines = []
    for name in [*paired.listed("policy"), *paired.listed("start")]:
        if asked := paired.played(name) and paired.asked(name):
            lines.append(f"{name} asked: " + ", ".join(f"{member} {part:.1%}" for member, part in asked.items()))
        if len(stops := paired.shares(name, "stop")) > 1 or not {"", "done"} >= set(stops):
            lines.append(f"{name} ended: " + ", ".join(f"{stop or 'done'} {part:.1%}" for stop, part in stops.items()))
    if paired.lost:
        lines.append(f"{paired.lost} items are left out of every line: the pool failed on them ({LOST})")
    return Section(SENT, (), lines)
