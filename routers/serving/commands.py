"""Serve a trained think/route agent on an OpenAI-compatible endpoint.

    srpo serve --model outputs/quickstart/think_route --catalogue members.yaml
    srpo serve --model outputs/quickstart/think_route --table quickstart     # recorded replies, to try it
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
      -d '{"model": "router", "max_cost_usd": 0.001, "messages": [{"role": "user", "content": "Calculate 12 - 8"}]}'

`usage.cost_usd` of a reply says what it cost. Needs the extra: pip install 'srpo[serve]'.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from routers import RouterAgent, load_catalogue, load_table, quickstart_table
from routers.pool import Ledger, Pool, ReplyCache, live_pool, recorded_pool
from routers.tasks.think_route.sft_rows import restricted, result_of
from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import at_least, between, ranged


def agent_arguments(parser: argparse.ArgumentParser) -> None:
    """What `make_agent` reads."""
    usd = ranged(at_least(0))
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    pool = parser.add_mutually_exclusive_group(required=True)
    pool.add_argument("--catalogue", type=Path, help="members behind OpenAI-compatible endpoints (YAML)")
    pool.add_argument("--table", help="recorded replies instead: quickstart, or a file")
    share = ranged(between(0, 1))
    parser.add_argument("--max-bad-share", type=share, default=MAX_BAD_SHARE, help="of the table's rows, left out")
    parser.add_argument("--drop-incomplete", action="store_true", help="leave out queries that lack a member's row")
    parser.add_argument("--reply-cache", type=Path, help="folder of a reply cache for the endpoints")
    parser.add_argument("--max-total-usd", type=usd, help="of all questions together; then no member is asked")
    parser.add_argument("--policy-price-in", type=usd, default=0.0, help="USD per million tokens it reads")
    parser.add_argument("--policy-price-out", type=usd, default=0.0, help="USD per million tokens it writes")


def make_agent(args: argparse.Namespace) -> RouterAgent:
    """The agent that the command line describes."""
    ledger = Ledger(args.max_total_usd, (args.policy_price_in, args.policy_price_out))
    if args.catalogue:
        cache = ReplyCache(args.reply_cache) if args.reply_cache else None
        return RouterAgent.from_pretrained(
            args.model, live_pool(load_catalogue(args.catalogue), ledger=ledger, cache=cache)
        )
    rows = {"max_bad_share": args.max_bad_share, "drop_incomplete": args.drop_incomplete}
    return RouterAgent.from_pretrained(args.model, recorded(args.table, args.model, ledger, **rows))


def recorded(
    table: str, model: str, ledger: Ledger, max_bad_share: float = MAX_BAD_SHARE, drop_incomplete: bool = False
) -> Pool:
    """Replies of a table, found by the text of the question, from the members that the policy was trained with."""
    from routers.tasks.think_route.settings import AgentSettings

    members = [member.name for member in AgentSettings.load(model).members] or None
    if table == "quickstart":
        replies = quickstart_table()
    else:
        replies = load_table(table, max_bad_share=max_bad_share, drop_incomplete=drop_incomplete)
    return recorded_pool(restricted(replies, members, result_of), by="query", ledger=ledger)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; serves until it is told to stop (Ctrl-C, SIGTERM)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    agent_arguments(parser)
    parser.add_argument("--name", default="router", help="what clients call the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=ranged(between(0, 65535), whole=True), default=8000)
    parser.add_argument("--api-key-env", help="environment variable that holds the key clients must send")
    args = parser.parse_args(argv)
    import uvicorn  # of the extra `serve`, which srpo route does without

    from routers.serving.server import create_app

    key = None
    if args.api_key_env:
        key = os.environ.get(args.api_key_env)
        if not key:
            parser.error(f"environment variable {args.api_key_env} is not set; export the key that clients must send")
    app = create_app(make_agent(args), name=args.name, api_key=key)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
