"""The report of an evaluation: Markdown for cards and screens, a picture, and an HTML page that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from routers.evaluation.episodes import Episodes
from routers.evaluation.losses import losses
from routers.evaluation.plot import curves_picture, picture
from routers.evaluation.statistics import PER_ITEMS, Paired, sets
from routers.evaluation.tables import FAMILIES, NOTE, SENT, Section, named, render, sections, shown

MARKDOWN, PICTURE, PAGE = "report.md", "frontier.png", "report.html"
VALIDATION = "validation.json"
"""What a run with an `eval_strategy` writes (`srpo.run.files`)."""
EXAMPLES = 8
"""Items won, and as many lost, that are shown of every policy."""
MOST_FAMILIES = 40
LONGEST = 400
"""Characters of an item's text."""
CURVES = {
    "reward": "reward",
    "correct/mean": "score",
    "cost/per_query_usd": f"USD per {PER_ITEMS:,} items",
    "calls/per_query": "calls per item",
    "route/share/none": "without a valid route",
    "route/entropy": "entropy of routes, nats",
    "budget/large_share": "share of expensive calls",
    "budget/violations": "budget violations",
    "frac_reward_zero_std": "groups of equal rewards",
    "srpo/gradient_share": "gradient share of distillation",
    "entropy": "entropy of tokens, nats",
    "completions/mean_length": "tokens per completion",
    "loss": "loss",
    "grad_norm": "gradient norm",
}
"""Key of a training record -> title of its curve."""
# No script, no network: whatever a query or a member's name says, it cannot act.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
tr.policy td { font-weight: 600; background: var(--soft); }
table.texts td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.heat td { text-align: center; } .heat td:first-child { text-align: left; }
.bar { display: flex; width: 30rem; height: 1.3rem; }
.bar span { overflow: hidden; font-size: .75rem; color: #000; padding-left: .2rem; white-space: nowrap; }
img { max-width: 100%; background: #fff; } ul { padding-left: 1.2rem; }
"""
_COLOURS = "#E69F00 #56B4E9 #009E73 #F0E442 #CC79A7 #D55E00 #8FB3E0 #BBBBBB".split()


def report(
    episodes: Episodes, folder: str | Path, *, title: str, records: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """Write `report.md`, `frontier.png` and `report.html` into a folder; returns the Markdown.

    Args:
        episodes: policies, their starts and baselines, on the same items.
        folder: made where it is missing.
        title: of the report.
        records: of the training, with `step`; None: those of the folder's `trainer_state.json`, if it has one.

    Raises:
        ValueError: a router was not played on every item, or the pool lost all of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "trainer_state.json"
    if records is None and state.is_file():
        records = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    more = [*_chosen_on(folder, records or ()), losses(folder, episodes)]
    text, drawn = render(episodes, title, markdown=True, more=more), picture(episodes, title)
    (folder / MARKDOWN).write_text(text, encoding="utf-8")
    (folder / PICTURE).write_bytes(drawn)
    (folder / PAGE).write_text(page(episodes, title, drawn, records or (), more), encoding="utf-8")
    return text


def _chosen_on(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Which items chose the best checkpoint of a run with an `eval_strategy`."""
    if not (folder / VALIDATION).is_file():
        return []
    items = json.loads((folder / VALIDATION).read_text(encoding="utf-8"))["items"]
    found = {record["step"]: record.get("eval_reward") for record in records}
    rewards = {step: reward for step, reward in found.items() if reward is not None and np.isfinite(reward)}
    told = f"On {len(items):,} items ({VALIDATION}), which were neither trained on nor held out."
    rows = [("step", "reward there"), *((str(step), f"{reward:.4f}") for step, reward in rewards.items())]
    lines = [told]
    if rewards:
        step = max(rewards, key=rewards.__getitem__)
        when = f"after step {step}" if step else "of the policy that RL began with"
        lines.append(f"The best mean reward there: {rewards[step]:.4f}, {when}")
    return [Section("Choice of the best checkpoint", rows, lines)]


def page(
    episodes: Episodes,
    title: str,
    drawn: bytes,
    records: Sequence[Mapping[str, Any]] = (),
    more: Sequence[Section] = (),
) -> str:
    """The report as one HTML page. Every text of the data is escaped.

    Args:
        episodes, title: as in `report`.
        drawn: the picture of the cost plane, as PNG.
        records: of the training's log, for its curves; none: it has none.
        more: sections beside those of the episodes.
    """
    parts = [f"<h1>{escape(title)}</h1>", _image(drawn, "Score and cost of every router")]
    found = sets(episodes)
    for name, paired in found.items():
        if len(found) > 1 or name:
            parts.append(f"<h2>{escape(name)}</h2>")
        strong = {named(paired, policy) for policy in paired.of_kind("policy")}
        for section in sections(paired):
            if section.title == FAMILIES:  # the heat map shows them, and all routers
                continue
            parts.append(f"<h3>{escape(section.title)}</h3>" if section.title else "")
            parts.append(_sent(paired) if section.title == SENT else _table(section.rows, strong, bold=section.bold))
            parts.append(_list(section.lines))
        parts.append(_heat_map(paired))
        parts += [_examples(paired, policy) for policy in paired.policies]
    if curves := curves_picture([_scaled(record) for record in records], CURVES):
        parts += ["<h2>Training</h2>", _image(curves, "Training curves: each step in grey, a running mean in red")]
    for section in more:
        parts += [f"<h2>{escape(section.title)}</h2>", _table(section.rows), _list(section.lines)]
    notes = [NOTE, str(episodes.header.get("note", "")), *_rules(episodes.header)]
    parts += ["<h2>Notes</h2>", _list([note for note in notes if note])]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(part for part in parts if part)
    head += f'<link rel="icon" href="data:,"><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _table(
    rows: Sequence[Sequence[str]],
    strong: Collection[str] = (),
    kind: str = "",
    bold: Collection[tuple[int, int]] = (),
) -> str:
    if len(rows) < 2:
        return ""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in rows[0]) + "</tr>"]
    for i, row in enumerate(rows[1:], start=1):
        mark = ' class="policy"' if row[0] in strong else ""
        cells = (f"<u>{escape(cell)}</u>" if (i, j) in bold else escape(cell) for j, cell in enumerate(row))
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _image(png: bytes, words: str) -> str:
    return f'<p><img alt="{escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def _heat_map(paired: Paired) -> str:
    """Score by router and family, as coloured cells; of many families the most frequent."""
    families = sorted(family for family, _ in Counter(paired.families).most_common(MOST_FAMILIES) if family)
    if len(families) < 2:
        return ""
    lines = ["<tr><th></th>" + "".join(f"<th>{escape(family)}</th>" for family in families) + "</tr>"]
    for name in shown(paired):
        by = paired.by(name, paired.families)
        cells = [(by[family], f"hsl(150 60% {92 - 45 * by[family]:.0f}%)") for family in families]
        row = "".join(f'<td style="background:{colour};color:#000">{value:.0%}</td>' for value, colour in cells)
        lines.append(f"<tr><td>{escape(named(paired, name))}</td>{row}</tr>")
    return f'<h3>{FAMILIES}</h3><div class="wide"><table class="heat">' + "\n".join(lines) + "</table></div>"


def _sent(paired: Paired) -> str:
    """Bars of whom each router asked, of all routers that choose."""
    routers = [name for name in shown(paired) if paired.routers[name] != "member" and paired.asked(name)]
    members = sorted({member for name in routers for member in paired.asked(name)})
    lines = []
    for name in routers:
        parts = [(member, paired.asked(name)[member]) for member in members if member in paired.asked(name)]
        spans = "".join(
            f'<span title="{escape(f"{member} {part:.1%}")}" style="width:{part:.2%};background:'
            f'{_COLOURS[members.index(member) % len(_COLOURS)]}">{escape(member)}</span>'
            for member, part in parts
        )
        lines.append(f'<tr><td>{escape(name)}</td><td><div class="bar">{spans}</div></td></tr>')
    return "<table>" + "".join(lines) + "</table>" if lines else ""


def _examples(paired: Paired, policy: str) -> str:
    """Items on which a policy beats the strongest baseline, and is beaten by it, by the most; of its first seed."""
    if not paired.references or not any(paired.queries):
        return ""
    other = paired.references[-1].router
    score, theirs = (paired.values(name, "score")[0] for name in (policy, other))
    gain = score - theirs
    asked, theirs_asked = (paired.first(name)["member"].tolist() for name in (policy, other))
    parts = []
    for what, order in (("won", np.argsort(-gain, kind="stable")), ("lost", np.argsort(gain, kind="stable"))):
        chosen = [i for i in order if (gain[i] > 0 if what == "won" else gain[i] < 0)]
        count = len(chosen)
        rows = [("", "family", f"{policy} asked", "score", f"{other} asked", "score")]
        for i in _spread(chosen):
            text = paired.queries[i] if len(paired.queries[i]) <= LONGEST else paired.queries[i][:LONGEST] + " …"
            rows.append((text, paired.families[i], asked[i], f"{score[i]:g}", theirs_asked[i], f"{theirs[i]:g}"))
        if count:
            parts.append(f"<h3>{escape(f'{count} of {len(paired)} {what} by {policy} against {other}')}</h3>")
            parts.append(_table(rows, kind="texts"))
    return "".join(parts)


def _spread(chosen: Sequence[int]) -> list[int]:
    """A few of them, from everywhere: items stand in order of their ids."""
    if len(chosen) <= EXAMPLES:
        return list(chosen)
    return [chosen[round(i)] for i in np.linspace(0, len(chosen) - 1, EXAMPLES)]


def _scaled(record: Mapping[str, Any]) -> dict[str, Any]:
    usd = "cost/per_query_usd"
    return {**record, **({usd: record[usd] * PER_ITEMS} if usd in record else {})}


def _rules(header: Mapping[str, Any]) -> list[str]:
    rules = header.get("rule", {})
    named = {f"Reward of {name}": rule for name, rule in rules.items() if isinstance(rule, Mapping)}
    plain = {name: value for name, value in rules.items() if not isinstance(value, Mapping)}
    return [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in rule.items())
        for name, rule in {**named, "Reward": plain}.items()
        if rule
    ]
