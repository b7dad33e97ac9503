r"""Serve a trained router on an OpenAI-compatible endpoint: its decisions carried out, or a think/route agent.

    srpo serve outputs/quickstart/srpo --catalogue pool.yaml          # a proxy in front of the members
    srpo serve outputs/quickstart/srpo                                # its decisions alone
    srpo serve outputs/quickstart/think_route --table quickstart      # recorded replies, to try it

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
      -d '{"model": "router", "max_cost_usd": 0.001, "messages": [{"role": "user", "content": "Calculate 12 - 8"}]}'

`usage.cost_usd` of a reply says what it cost. Needs the extra: pip install 'srpo[serve]'.
"""

import argparse
import os
from collections.abc import Sequence

from routers.serving.making import make_worker, router_arguments
from srpo.ranges import between, ranged


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; serves until it is told to stop (Ctrl-C, SIGTERM)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    router_arguments(parser)
    parser.add_argument("--name", default="router", help="what clients call the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=ranged(between(0, 65535), whole=True), default=8000)
    parser.add_argument("--api-key-env", help="environment variable that holds the key clients must send")
    parser.add_argument("--public-metrics", action="store_true", help="/metrics needs no key")
    args = parser.parse_args(argv)
    import uvicorn  # of the extra `serve`, which `srpo route` does without

    from routers.serving.server import create_app

    key = None
    if args.api_key_env:
        key = os.environ.get(args.api_key_env)
        if not key:
            raise ValueError(f"environment variable {args.api_key_env} is not set; export the key clients must send")
    worker = make_worker(args, args.name)
    app = create_app(worker, name=args.name, api_key=key, public_metrics=args.public_metrics)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
