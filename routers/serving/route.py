"""Send a query through a trained router: which member answers it, how sure the router is, and what it costs.

srpo route outputs/quickstart/router "Calculate 12 - 8"                        # the decision
srpo route outputs/quickstart/router "Calculate 12 - 8" --catalogue pool.yaml  # and the member's reply
srpo route user/agent "Who wrote Dune?" --catalogue pool.yaml --max_cost_usd 0.001
srpo route outputs/quickstart/router --file queries.txt --json                 # one query a line
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routers.data.billing import shown_usd
from routers.router import Answer, Decision
from routers.serving.forward import Forwarder
from routers.serving.making import make_router, router_arguments
from srpo.cli import Parser
from srpo.ranges import at_least, ranged


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 where every query has a member, or an answer if a pool was to give one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    router_arguments(parser)
    parser.add_argument("query", nargs="?")
    parser.add_argument("--file", type=Path, help="text file with one query a line, instead of a query")
    parser.add_argument("--max_cost_usd", type=ranged(at_least(0)), help="hard cap for a query")
    parser.add_argument("--cost_weight", type=ranged(at_least(0)), help="price sensitivity, where it was trained")
    parser.add_argument("--json", action="store_true", help="print one JSON object per query")
    args = parser.parse_args(argv)
    if (args.query is None) == (args.file is None):
        raise ValueError("give a query, or --file with one query a line")
    queries = [args.query] if args.file is None else args.file.read_text(encoding="utf-8").splitlines()
    found = []
    router = make_router(args)
    try:
        for query in filter(str.strip, queries):
            if router.pool is None:
                decider = router.router if isinstance(router, Forwarder) else router
                found.append(decider.route(query, cost_weight=args.cost_weight))
            else:
                found.append(router.answer(query, args.max_cost_usd, cost_weight=args.cost_weight))
            print(json.dumps(record(query, found[-1])) if args.json else told(found[-1]), flush=True)
    finally:
        router.close()
    if not found:
        raise ValueError("there is no query: all lines are empty")
    return int(any((one.member if isinstance(one, Decision) else one.answer) is None for one in found))


def record(query: str, found: Decision | Answer) -> dict[str, Any]:
    """As JSON."""
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "trajectory"}
    usd = {name: shown_usd(value) for name, value in fields.items() if name.endswith("usd") and value is not None}
    return {"query": query, **fields, **usd}


def told(found: Decision | Answer) -> str:
    """As text."""
    scores = ", ".join(f"{m} {p:.3f}" for m, p in sorted(found.scores.items(), key=lambda item: -item[1]))
    if isinstance(found, Decision):
        call = "unknown" if found.usd is None else f"${found.usd:.6f}"
        member = found.member or f"none. {found.error}"
        lines = [*([found.text, ""] if found.text else []), f"member: {member}", f"probabilities: {scores or 'none'}"]
        return "\n".join([*lines, f"cost: {call} expected for the call, ${found.policy_usd:.6f} for the decision"])
    lines = [shown for owner, text in found.turns if (shown := text if owner == "policy" else text.strip())]
    lines += [*([""] if lines else []), f"answer: {found.answer}"] + ([f"probabilities: {scores}"] if scores else [])
    lines.append(f"cost: ${found.cost_usd:.6f}, asked: {', '.join(found.members) or 'nobody'}")
    if found.answer is None:
        lines.append(f"no answer: {found.error or found.stop}")
    return "\n".join(lines)
