"""All of one table's frontier: every baseline and the encoder policy over a sweep of price sensitivities.

    srpo frontier --table quickstart
    srpo frontier --table quickstart --online
    srpo frontier --table data/llmrouter/table.parquet --runs outputs/llmrouter/srpo-seed* --members_left_out

Everything is fitted, tuned and trained on the table's training split, and played on its held-out queries. It writes
evaluation.parquet, table.md, report.html and frontier.png. `--runs` adds policies of `srpo train` on this table.
`--online` plays routers that learn from the outcomes of their own choices instead: each chooses its settings on a
quarter of the training queries, and starts anew on the others, a stream in another order for every seed, and the
held-out ones afterwards: table.md, evaluation.parquet, regret.png.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from routers.evaluation.compare import compared
from routers.evaluation.episodes import EPISODES, Episodes, Kind, Outcomes, RewardRule
from srpo.cli import Parser
from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import at_least, between, ranged

if TYPE_CHECKING:
    from routers.data.table import ReplyTable

SWEEP = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
EXPECTED = "expected"
"""The objective of an encoder that knows every outcome, beside those of `srpo.objectives`."""
PROBES = 256
"""Training queries whose outcomes describe a member that was left out of the fitting (as many as V_0 has)."""
TABLE, REGRET = "table.md", "regret.png"
OFFLINE = ("cost_weights", "objectives", "runs", "members_left_out")
"""Options that `--online` does not take."""


def main(argv: Sequence[str] | None = None) -> str:
    """Command line; returns the tables that it printed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weight, count = ranged(at_least(0)), ranged(at_least(1), whole=True)
    parser.add_argument("--table", default="quickstart", help="recorded replies (default: the shipped pool)")
    parser.add_argument("--catalogue", help="prices (default: catalogue.yaml beside the table)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: outputs/frontier/TABLE")
    parser.add_argument("--seeds", type=count, default=5, help="of the encoder policy, or of the streams (5)")
    parser.add_argument("--cost_weight", type=weight, default=0.2, help="of the reward (0.2)")
    parser.add_argument("--cost_weights", type=weight, nargs="+", default=SWEEP, help="of the sweep", metavar="WEIGHT")
    parser.add_argument("--baselines", nargs="*", metavar="NAME", help="default: all that can be played")
    parser.add_argument("--objectives", nargs="*", default=[EXPECTED], help="of encoder policies (expected)")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], metavar="RUN", help="folders of srpo train")
    parser.add_argument("--heldout_limit", type=count, help="play this many held-out queries")
    share = ranged(between(0, 1))
    parser.add_argument(
        "--max_bad_share", type=share, default=MAX_BAD_SHARE, help="of the table's rows, left out (.05)"
    )
    parser.add_argument("--drop_incomplete", action="store_true", help="leave out queries that some member lacks")
    parser.add_argument("--members_left_out", action="store_true", help="each member in turn is new")
    parser.add_argument("--online", action="store_true", help="routers that learn on a stream instead")
    how = parser.parse_args(argv)
    from routers.data.table import replies_of
    from routers.evaluation.report import MARKDOWN, report

    path = Path(how.table)
    name = how.table if not path.suffix else path.parent.name or path.stem
    folder = how.output or Path("outputs", "frontier", Path(name).name)
    rest = {"max_bad_share": how.max_bad_share, "drop_incomplete": how.drop_incomplete, "folder": folder}
    if how.online and (fixed := [option for option in OFFLINE if getattr(how, option) != parser.get_default(option)]):
        raise ValueError(f"--{fixed[0]} is not of --online, which learns from one outcome at a time; leave it out")
    table = replies_of(how.table, how.catalogue, **rest)
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["srpo", "frontier", *(sys.argv[1:] if argv is None else argv)])
    text = f"```bash\n{command}\n```\n\n"
    if how.online:
        found, told = online(table, how, folder, f"Regret: {name}")
        text += told
    else:
        found = frontier(table, how)
        text += report(found, folder, title=f"Frontier: {name}")
        (folder / MARKDOWN).unlink()
    found.write(folder / EPISODES)
    (folder / TABLE).write_text(text, encoding="utf-8")
    print(text, folder / TABLE, sep="\n")
    return text


def frontier(table: ReplyTable, how: argparse.Namespace) -> Episodes:
    """All episodes of the command; `how`: its options."""
    from routers.baselines import BASELINES
    from routers.baselines.play import play_baselines, table_header
    from routers.tasks.query_routing.encoder.training import LEAST
    from srpo.objectives.names import OBJECTIVE_NAMES

    if unknown := [name for name in how.baselines or () if name not in BASELINES]:
        raise ValueError(f"--baselines: there is no {unknown[0]!r}; there are {', '.join(BASELINES)}")
    rule, items, train, tell = _read(table, how)
    if unknown := [name for name in how.objectives if name not in (EXPECTED, *OBJECTIVE_NAMES)]:
        raise ValueError(
            f"--objectives: there is no {unknown[0]!r}; there are {', '.join((EXPECTED, *OBJECTIVE_NAMES))}"
        )
    if how.objectives and len(train.items) < LEAST:
        raise ValueError(
            f"{table.source}: has {len(train.items)} training queries, and the encoder needs {LEAST}: give "
            "--objectives alone to leave it out"
        )
    if how.members_left_out and len(train.members) < 2:
        raise ValueError(f"--members_left_out: {table.source} has one member, and without it nobody is left")
    names, header = list(BASELINES) if how.baselines is None else how.baselines, table_header(rule, "heldout")
    parts = [_runs(how.runs, rule, {str(item["query_id"]) for item in items.items})] if how.runs else []
    parts.append(play_baselines(items, train, header, names=names, sweep=how.cost_weights, tell=tell))
    encoders = {f"encoder {objective}": _encoder(table, how, rule, objective) for objective in how.objectives}
    for name, fit in encoders.items():
        for seed in range(how.seeds):
            router = fit(train, seed)
            tell(f"{name}, seed {seed}: reads {router.model.reads}")
            parts += _swept(items, router, name, seed, how.cost_weights)
            reads = {"reads": {f"{name}, seed {seed}": router.model.reads}}
            parts[-1] = Episodes(parts[-1].frame, {**parts[-1].header, **reads})
    if how.members_left_out:
        new = {n: BASELINES[n] for n in names if isinstance(BASELINES[n].how, type) and BASELINES[n].kind == "learned"}
        able = {n: one for n, one in new.items() if hasattr(one.how, "introduce")}
        for name, one in able.items():
            parts.append(left_out(items, train, name, one.kind, [partial(_fitted, one.how)], tell))
        for name, fit in encoders.items():
            seeds = [partial(fit, seed=seed) for seed in range(how.seeds)]
            parts.append(left_out(items, train, name, "policy", seeds, tell, table.catalogue))
        parts.append(Episodes(parts[0].frame, {"need_every_member": [name for name in new if name not in able]}))
    return Episodes.merged(parts)


def online(table: ReplyTable, how: argparse.Namespace, folder: Path, title: str) -> tuple[Episodes, str]:
    """Episodes and table of `--online`; writes its picture into the folder."""
    from routers.baselines.online import learners
    from routers.baselines.play import table_header
    from routers.baselines.stream import OURS, play_learners, regret_picture, stream_table

    if unknown := [name for name in how.baselines or () if name not in learners()]:
        raise ValueError(f"--baselines: no online router is called {unknown[0]!r}; there are {', '.join(learners())}")
    rule, items, train, tell = _read(table, how)
    names = [name for name in learners() if how.baselines is None or name in (*how.baselines, OURS)]
    found, streams, chosen = play_learners(train, items, range(how.seeds), names, tell)
    (folder / REGRET).write_bytes(regret_picture(streams, title))
    told = (
        f"Settings chosen on a quarter of {len(train.items)} queries; the others in another order for each of "
        f"{how.seeds} seeds, then {len(items.items)} held-out ones; {len(items.members)} members, cost weight "
        f"{how.cost_weight:g}; 95 % intervals over queries and seeds, differences paired.\n\n"
        f"{stream_table(found, OURS, chosen)}\n\n![regret]({REGRET})\n"
    )
    return Episodes(found.frame, table_header(rule, "heldout")), told


def _read(
    table: ReplyTable, how: argparse.Namespace
) -> tuple[RewardRule, Outcomes, Outcomes, Callable[[str], object]]:
    """Rule, held-out and training outcomes of the command, and who is told what it is at."""
    from routers.baselines.play import spread_of

    rule = RewardRule(table.max_cost, how.cost_weight)
    items = Outcomes.of_table(table, rule, "heldout", spread_of(table, "heldout", how.heldout_limit))
    train = Outcomes.of_table(table, rule, "train", spread_of(table, "train", None))
    start = time.perf_counter()

    def tell(what: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {what}", file=sys.stderr, flush=True)

    tell(f"{len(train.items)} training and {len(items.items)} held-out queries, {len(items.members)} members")
    return rule, items, train, tell


def left_out(
    items: Outcomes,
    train: Outcomes,
    name: str,
    kind: Kind,
    fits: Sequence[Callable[[Outcomes], Any]],
    tell: Callable[[str], object],
    catalogue: Mapping[str, Any] | None = None,
) -> Episodes:
    """A router when each member in turn is new to it: fitted without it, then told its outcomes on `PROBES` queries.

    Args:
        items, train: to route, and to fit on.
        name, kind: of the router.
        tell: is told what it is at.
        fits: one per seed, training items -> router with `introduce` or `learn_member`.
        catalogue: of the members, for `learn_member`.

    Returns:
        Episodes of `statistics.LEFT_OUT`, with the mean over the members left out.
    """
    from routers.data.table import spread
    from routers.evaluation.statistics import LEFT_OUT

    probes, parts = train.rows(spread(len(train.items), min(PROBES, len(train.items)))), []
    texts = [item["query"] for item in items.items]
    for seed, fit in enumerate(fits):
        weights = np.zeros(items.score.shape)
        for new, member in enumerate(items.members):
            tell(f"{name}, seed {seed}, without {member}")
            router = fit(_without(train, new))
            if hasattr(router, "introduce"):
                router.introduce(probes)
            else:
                asked = [item["query"] for item in probes.items]
                router.learn_member((catalogue or {})[member], asked, probes.score[:, new], probes.usd[:, new])
            places = [items.members.index(decision.member) for decision in router.route_all(texts)]
            weights[np.arange(len(texts)), places] += 1 / len(items.members)
        parts.append(items.play(LEFT_OUT.format(name), kind, weights, seed=seed))
    return Episodes.merged(parts)


def _fitted(kind: Any, part: Outcomes) -> Any:
    return kind().fit(part)


def _encoder(table: ReplyTable, how: argparse.Namespace, rule: RewardRule, objective: str) -> Callable[..., Any]:
    from routers.tasks.query_routing.encoder.training import train_encoder

    weights = [how.cost_weight, *(weight for weight in how.cost_weights if weight != how.cost_weight)]

    def fit(train: Outcomes, seed: int) -> Any:
        return train_encoder(
            train, rule, catalogue=table.catalogue, cost_weights=weights, seed=seed, objective=objective, minilm=None
        )

    return fit


def _swept(items: Outcomes, router: Any, name: str, seed: int, weights: Sequence[float]) -> list[Episodes]:
    from routers.baselines.play import seconds_of

    texts, parts = [item["query"] for item in items.items], []
    seconds, embedded = seconds_of(router, texts), router.model.embed(texts)
    for weight in (None, *weights):
        routes = [decision.member for decision in router.decide(embedded, weight)]
        label, curve = (name, "") if weight is None else (f"{name}, price sensitivity {weight:g}", name)
        parts.append(items.play(label, "policy", routes, seed=seed, curve=curve, seconds=seconds))
    return parts


def _runs(folders: Sequence[Path], rule: RewardRule, items: set[str]) -> Episodes:
    """Policies of other runs and their starts on the same items, with this evaluation's reward."""
    read = {folder: Episodes.read(folder) for folder in folders}
    for folder, found in read.items():
        if missing := items - set(found.frame["item"]):
            raise ValueError(
                f"{folder} was not evaluated on {len(missing)} of these {len(items)} held-out queries: evaluate it "
                "again (srpo evaluate) on this table, without heldout_limit"
            )
        trained = found.of(kind=["policy", "start"]).frame
        read[folder] = Episodes(trained[trained["item"].isin(items)])
    frame = compared(read).frame
    return Episodes(frame.assign(reward=rule(frame["score"], frame["usd"], frame["valid"])))


def _without(known: Outcomes, member: int) -> Outcomes:
    matrices = ("score", "usd", "reward")
    values: dict[str, Any] = {name: np.delete(getattr(known, name), member, axis=1) for name in matrices}
    return replace(known, members=[*known.members[:member], *known.members[member + 1 :]], extra={}, **values)
