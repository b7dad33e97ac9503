"""Ask a trained think/route agent one question, and see what it did and what it cost.

    srpo route --model outputs/quickstart/think_route --table quickstart "Calculate 12 - 8"
    srpo route --model user/router --catalogue members.yaml --max-cost-usd 0.001 "Who wrote Dune?"
"""

import argparse
import json
from collections.abc import Sequence

from routers.serving.commands import agent_arguments, make_agent
from srpo.ranges import at_least, ranged


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 where there is an answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    agent_arguments(parser)
    parser.add_argument("question")
    parser.add_argument("--max-cost-usd", type=ranged(at_least(0)), help="hard cap for this question")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    with make_agent(args) as agent:
        found = agent.answer(args.question, args.max_cost_usd)
    if args.json:
        names = ("answer", "stop", "error", "cost_usd", "members", "prompt_tokens", "completion_tokens", "turns")
        print(json.dumps({name: getattr(found, name) for name in names}))
    else:
        for owner, text in found.turns:
            print(text if owner == "policy" else text.strip())
        print(f"\nanswer: {found.answer}\ncost: ${found.cost_usd:.6f}, asked: {', '.join(found.members) or 'nobody'}")
        if found.answer is None:
            print(f"no answer: {found.error or found.stop}")
    return 0 if found.answer is not None else 1
