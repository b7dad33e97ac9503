r"""Serve a trained router on an OpenAI-compatible endpoint: its decisions carried out, or a think/route agent.

    srpo serve outputs/quickstart/srpo --catalogue pool.yaml          # replies of the members that it chooses
    srpo serve outputs/quickstart/srpo                                # its decisions alone
    srpo serve outputs/quickstart/think_route --table quickstart      # recorded replies, to try it

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
      -d '{"model": "router", "max_cost_usd": 0.001, "messages": [{"role": "user", "content": "Calculate 12 - 8"}]}'

`usage.cost_usd` of a reply says what it cost. Needs the extra: pip install 'srpo[serve]'.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from routers.data.table import load_table, quickstart_table
from routers.pool import Ledger, Pool, ReplyCache, live_pool, recorded_pool
from routers.router import load_router, members_now, read_router
from routers.serving.forward import Forwarder, forwarding_pool
from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import at_least, between, ranged


def router_arguments(parser: argparse.ArgumentParser) -> None:
    """What `make_router` reads."""
    usd = ranged(at_least(0))
    parser.add_argument("model", help="folder or Hub id of a router that `srpo train` wrote")
    parser.add_argument("--members", type=lambda text: text.split(","), help="route among these only: a,b,c")
    parser.add_argument("--catalogue", type=Path, help="the pool as it is now: prices, endpoints, new members (YAML)")
    parser.add_argument("--table", help="recorded replies instead of endpoints: quickstart, or a file")
    share = ranged(between(0, 1))
    parser.add_argument("--max-bad-share", type=share, default=MAX_BAD_SHARE, help="of the table's rows, left out")
    parser.add_argument("--drop-incomplete", action="store_true", help="leave out queries that lack a member's row")
    parser.add_argument("--reply-cache", type=Path, help="folder of a reply cache for the endpoints")
    parser.add_argument("--max-total-usd", type=usd, help="of all questions together; then no member is asked")
    parser.add_argument("--policy-price-in", type=usd, help="USD per million tokens that the policy reads")
    parser.add_argument("--policy-price-out", type=usd, help="USD per million tokens that the policy writes")


def make_router(args: argparse.Namespace) -> Any:
    """The agent, or the query router with its pool (`Forwarder`), that the command line describes.

    Raises:
        ValueError: a step router, or options that do not go together.
    """
    file = read_router(args.model)
    if args.table and args.catalogue:
        raise ValueError("give --catalogue (endpoints) or --table (recorded replies), not both")
    if file.kind == "step_routing":
        raise ValueError(
            f"{args.model} is a step router, which decides inside an agent's loop: watch it with `srpo play`, or open "
            "a session in your own loop, load_router(...).session(task, cap=...)"
        )
    cache = ReplyCache(args.reply_cache) if args.reply_cache else None
    price = (args.policy_price_in, args.policy_price_out)
    if file.kind != "think_route":  # decides once per query, and has it carried out
        router = load_router(args.model, members=args.members, catalogue=args.catalogue)
        own = (0.0, 0.0)
        if file.kind == "query_routing":
            trained = router.settings.policy_price
            own = tuple(old if new is None else new for new, old in zip(price, trained, strict=True))
            router.settings = replace(router.settings, policy_price=own)
        elif any(price):
            raise ValueError(f"a router of kind {file.kind} reads and writes no tokens: leave --policy-price-* out")
        ledger = Ledger(args.max_total_usd, own)
        names = [member.name for member in router.members]
        pool = recorded(args, names, ledger) if args.table else forwarding_pool(router.members, ledger, cache)
        return Forwarder(router, pool)
    ledger = Ledger(args.max_total_usd, (price[0] or 0.0, price[1] or 0.0))
    from routers.tasks.think_route.settings import KIND, AgentSettings

    asked = None
    trained_members = file.settings_of(AgentSettings, KIND).members
    if args.table:
        asked = recorded(args, args.members or [member.name for member in trained_members] or None, ledger)
    elif args.catalogue:
        members = members_now(trained_members, args.members, args.catalogue)
        asked = live_pool({member.name: member for member in members}, ledger=ledger, cache=cache)
    return load_router(args.model, members=args.members, pool=asked)


def recorded(args: argparse.Namespace, members: Sequence[str] | None, ledger: Ledger) -> Pool:
    """Replies of a table, found by the text of the question, from these members."""
    from routers.tasks.think_route.sft_rows import restricted, result_of

    if args.table == "quickstart":
        replies = quickstart_table()
    else:
        replies = load_table(args.table, max_bad_share=args.max_bad_share, drop_incomplete=args.drop_incomplete)
    return recorded_pool(restricted(replies, members, result_of), by="query", ledger=ledger)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; serves until it is told to stop (Ctrl-C, SIGTERM)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    router_arguments(parser)
    parser.add_argument("--name", default="router", help="what clients call the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=ranged(between(0, 65535), whole=True), default=8000)
    parser.add_argument("--api-key-env", help="environment variable that holds the key clients must send")
    args = parser.parse_args(argv)
    import uvicorn  # of the extra `serve`, which `srpo route` does without

    from routers.serving.server import create_app

    key = None
    if args.api_key_env:
        key = os.environ.get(args.api_key_env)
        if not key:
            raise ValueError(f"environment variable {args.api_key_env} is not set; export the key clients must send")
    if read_router(args.model).kind == "think_route" and not (args.catalogue or args.table):
        raise ValueError("an agent answers with a pool: give --catalogue or --table")
    app = create_app(make_router(args), name=args.name, api_key=key)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
