"""The router that a command line describes: for `srpo route` with its pool, for `srpo serve` as a `Worker`."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.data.catalogue import Member, load_catalogue, member_names
from routers.data.table import load_table, quickstart_table
from routers.pool import Endpoint, Ledger, Pool, ReplyCache, live_pool, recorded_pool
from routers.pool.passthrough import Passthrough
from routers.router import RouterFile, load_router, members_now, read_router
from routers.serving.forward import Forwarder, forwarding_pool, with_endpoints
from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import at_least, between, ranged

if TYPE_CHECKING:  # of the extra `serve`, which `srpo route` does without
    from routers.serving.proxy import Line
    from routers.serving.served import Worker
    from routers.serving.tracing import Tracing

_OF_STEPS = ("step_routing", "step_rule")


def router_arguments(parser: argparse.ArgumentParser) -> None:
    """What `make_router` reads."""
    usd = ranged(at_least(0))
    parser.add_argument("model", help="folder or Hub id of a router that `srpo train` wrote")
    parser.add_argument("--members", action="append", help="route among these only: a,b,c")
    parser.add_argument("--catalogue", type=Path, help="the pool as it is now: prices, endpoints, new members (YAML)")
    parser.add_argument("--table", help="recorded replies instead of endpoints: quickstart, or a file")
    share = ranged(between(0, 1))
    parser.add_argument("--max_bad_share", type=share, default=MAX_BAD_SHARE, help="of the table's rows, left out")
    parser.add_argument("--drop_incomplete", action="store_true", help="leave out queries that lack a member's row")
    parser.add_argument("--reply_cache", type=Path, help="folder of a reply cache for the endpoints")
    parser.add_argument("--max_total_usd", type=usd, help="of all questions together; then no member is asked")
    parser.add_argument("--policy_price_in", type=usd, help="USD per million tokens that the policy reads")
    parser.add_argument("--policy_price_out", type=usd, help="USD per million tokens that the policy writes")


def serving_arguments(parser: argparse.ArgumentParser) -> None:
    """What `make_worker` reads besides."""
    usd = ranged(at_least(0))
    parser.add_argument("--safe_member", help="who gets what a query router abstains from; without it that is a 422")
    parser.add_argument("--conversation_cap", type=usd, help="of a step router: hard limit of an agent's conversation")
    parser.add_argument("--conversation_unit", choices=("usd", "large_calls"), help="of that cap; default: as trained")
    parser.add_argument("--conversations", type=Path, help="of a step router: file that keeps them over restarts")
    parser.add_argument("--sticky_usd", type=usd, help="of a step router: what certainty must be worth for a switch")


def make_router(args: argparse.Namespace) -> Any:
    """For `srpo route`: the agent, or the query router with its pool (`Forwarder`).

    Raises:
        ValueError: a step router, or options that do not go together.
    """
    file = _checked(args)
    if file.kind in _OF_STEPS:
        raise ValueError(
            f"{args.model} is a step router, which decides inside an agent's loop: serve it with `srpo serve`, watch "
            "it with `srpo play`, or open a session in your own loop, load_router(...).session(task, cap=...)"
        )
    if file.kind == "think_route":
        return _agent(args, file)
    router, ledger = _query_router(args, file)
    if args.table:
        return Forwarder(router, recorded(args, [member.name for member in router.members], ledger))
    return Forwarder(router, forwarding_pool(router.members, ledger, _cache(args)))


def make_worker(args: argparse.Namespace, name: str, tracing: Tracing | None = None) -> Worker:
    """For `srpo serve`: who answers its requests, under this name.

    Args:
        args: of `router_arguments` and `serving_arguments`.
        tracing: makes a span of each attempt at a member; None: nobody does.

    Raises:
        ValueError: options that do not go together, or an agent or a step router without a pool.
    """
    from routers.serving.agent import AgentWorker
    from routers.serving.proxy import Proxy
    from routers.serving.stand_ins import NameOnly, RecordedReplies

    file = _checked(args)
    if file.kind in _OF_STEPS:
        return _step_worker(args, file, name, tracing)
    given = (args.conversation_cap, args.conversation_unit, args.conversations, args.sticky_usd)
    if any(one is not None for one in given):
        raise ValueError(
            f"a router of kind {file.kind} keeps no conversations: leave --conversation_cap, --conversation_unit, "
            "--conversations and --sticky_usd out"
        )
    if file.kind == "think_route":
        if not (args.catalogue or args.table):
            raise ValueError("an agent answers with a pool: give --catalogue or --table")
        if args.safe_member:
            raise ValueError("an agent answers by itself: leave --safe_member out")
        return AgentWorker(_agent(args, file, tracing), name)
    if args.reply_cache:
        raise ValueError("a server in front of members keeps no replies: leave --reply_cache out")
    router, ledger = _query_router(args, file)
    for words in other_pool([str(one["name"]) for one in file.settings["members"]], router.members):
        print(f"srpo serve: {words}", file=sys.stderr, flush=True)
    lines: dict[str, Line] = {}
    if args.table:
        pool = recorded(args, [member.name for member in router.members], ledger)
        lines = {member.name: RecordedReplies(pool, member.name) for member in router.members}
    elif with_endpoints(router.members):
        line = Passthrough if tracing is None else tracing.passthrough
        lines = {member.name: line(member, ledger) for member in router.members}
    else:
        lines = {member.name: NameOnly(member.name) for member in router.members}
    return Proxy(router, lines, ledger, name, safe=args.safe_member)


def other_pool(trained: Sequence[str], now: Sequence[Member]) -> list[str]:
    """What whoever starts a server should know where its members are not those of the router's training."""
    names = [member.name for member in now]
    left_out = [name for name in trained if name not in names]
    new = [name for name in names if name not in trained]
    found = [f"routes among {', '.join(names)}; without {', '.join(left_out)} of its training"] if left_out else []
    if new:
        found.append(
            f"the router never saw {', '.join(new)} answer, and knows no more of them than the catalogue says: record "
            "what they answer (srpo record), and train a router on it (srpo train quickstart/own_pool)"
        )
    return found


def _checked(args: argparse.Namespace) -> RouterFile:
    file = read_router(args.model)
    if args.table and args.catalogue:
        raise ValueError("give --catalogue (endpoints) or --table (recorded replies), not both")
    if args.members:
        known = {one["name"] for one in file.settings.get("members", ())}
        args.members = member_names(
            args.members, known | {*(load_catalogue(args.catalogue) if args.catalogue else ())}
        )
    return file


def _step_worker(args: argparse.Namespace, file: RouterFile, name: str, tracing: Tracing | None) -> Worker:
    from routers.serving.steps import StepProxy
    from routers.tasks.step_routing.conversations import Conversations
    from routers.tasks.step_routing.kept import Kept

    if args.table or args.members or args.reply_cache or args.safe_member or not args.catalogue:
        raise ValueError(
            "a step router passes the calls of agents on to the members that it was trained with: give --catalogue, "
            "and leave --table, --members, --reply_cache and --safe_member out"
        )
    router = load_router(args.model)
    catalogue, names = load_catalogue(args.catalogue), router.settings.executors
    if missing := [member for member in names if member not in catalogue]:
        raise ValueError(f"{args.catalogue}: there is no member {missing[0]!r}, which the router was trained with")
    if others := [member for member in catalogue if member not in names]:
        words = f"never asks {', '.join(others)}: the router was trained with {', '.join(names)}"
        print(f"srpo serve: {words}", file=sys.stderr, flush=True)
    members = {member: catalogue[member] for member in names}
    ledger = Ledger(args.max_total_usd, _own_price(args, router.settings.policy_price))
    kept, budget = None, router.settings.budget(args.conversation_cap, args.conversation_unit)
    if budget.cap is not None:
        print(f"srpo serve: a conversation may spend {budget.cap:g} {budget.unit}", file=sys.stderr, flush=True)
    if args.conversations:
        kept = Kept(args.conversations, f"{budget.unit} of {_fingerprint(args.model)}")
    decisions = Conversations(
        router,
        cap=budget.cap,
        unit=budget.unit,
        members=members,
        worth_usd=args.sticky_usd,
        kept=kept,
    )
    line = Passthrough if tracing is None else tracing.passthrough
    return StepProxy(decisions, {one: line(member, ledger) for one, member in members.items()}, ledger, name)


def _fingerprint(model: str) -> str:
    """Of what the ids in a conversation mean: a router's settings, and its tokenizer."""
    from srpo.rollout.shared import find_file  # imports torch

    found = hashlib.sha256()
    for name in ("router.yaml", "tokenizer.json"):
        if (path := find_file(model, name)) is not None:
            found.update(path.read_bytes())
    return found.hexdigest()


def _own_price(args: argparse.Namespace, trained: tuple[float, float]) -> tuple[float, float]:
    """USD per million tokens that the policy reads and writes: as in training, where the command line says nothing."""
    read, wrote = args.policy_price_in, args.policy_price_out
    return trained[0] if read is None else read, trained[1] if wrote is None else wrote


def _query_router(args: argparse.Namespace, file: RouterFile) -> tuple[Any, Ledger]:
    """One that decides once per query, and where its own tokens and its members' are booked."""
    router = load_router(args.model, members=args.members, catalogue=args.catalogue)
    own = (0.0, 0.0)
    if file.kind == "query_routing":
        own = _own_price(args, router.settings.policy_price)
        router.settings = replace(router.settings, policy_price=own)
    elif args.policy_price_in or args.policy_price_out:
        raise ValueError(f"a router of kind {file.kind} reads and writes no tokens: leave --policy_price_* out")
    return router, Ledger(args.max_total_usd, own)


def _agent(args: argparse.Namespace, file: RouterFile, tracing: Tracing | None = None) -> Any:
    from routers.tasks.think_route.settings import KIND, AgentSettings

    ledger = Ledger(args.max_total_usd, (args.policy_price_in or 0.0, args.policy_price_out or 0.0))
    trained, asked = file.settings_of(AgentSettings, KIND).members, None
    if args.table:
        asked = recorded(args, args.members or [member.name for member in trained] or None, ledger)
    elif args.catalogue:
        members = members_now(trained, args.members, args.catalogue)
        endpoint = Endpoint if tracing is None else tracing.endpoint
        named = {member.name: member for member in members}
        asked = live_pool(named, ledger=ledger, cache=_cache(args), endpoint=endpoint)
    return load_router(args.model, members=args.members, pool=asked)


def _cache(args: argparse.Namespace) -> ReplyCache | None:
    return ReplyCache(args.reply_cache) if args.reply_cache else None


def recorded(args: argparse.Namespace, members: Sequence[str] | None, ledger: Ledger) -> Pool:
    """Replies of a table, found by the text of the question, from these members."""
    from routers.tasks.think_route.sft_rows import restricted, result_of

    if args.table == "quickstart":
        replies = quickstart_table()
    else:
        replies = load_table(args.table, max_bad_share=args.max_bad_share, drop_incomplete=args.drop_incomplete)
    return recorded_pool(restricted(replies, members, result_of), by="query", ledger=ledger)
