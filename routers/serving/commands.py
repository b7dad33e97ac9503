r"""Serve a trained router on an OpenAI-compatible endpoint: its decisions carried out, or a think/route agent.

    srpo serve outputs/quickstart/router --catalogue pool.yaml          # a proxy in front of the members
    srpo serve outputs/quickstart/router                                # its decisions alone
    # a decision per call of an agent's loop:
    srpo serve STEP_ROUTER --catalogue pool.yaml --conversation_cap 0.5 --conversation_unit usd
    srpo serve outputs/quickstart/think_route --table quickstart      # recorded replies, to try it

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
      -d '{"model": "router", "max_cost_usd": 0.001, "messages": [{"role": "user", "content": "Calculate 12 - 8"}]}'

OTEL_EXPORTER_OTLP_ENDPOINT says where spans go, with the extra `otel` (see `routers.serving.tracing`).
`usage.cost_usd` of a reply says what it cost. `--keys` says who may ask, and how much (see `routers.serving.keys`).
SIGTERM stops the server when all that has arrived is answered, or after --drain_seconds. Needs the extra: pip install
'srpo[serve]'.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routers.serving.making import make_worker, router_arguments, serving_arguments
from srpo.cli import Parser
from srpo.garbage import set_imports_aside
from srpo.ranges import at_least, between, ranged

_RECEIVERS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def _on_a_line(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=42, width=119)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; serves until it is told to stop (Ctrl-C, SIGTERM)."""
    usage = "srpo serve MODEL [options]"
    parser = Parser(usage=usage, description=__doc__, formatter_class=_on_a_line)
    router_arguments(parser)
    serving_arguments(parser)
    parser.add_argument("--name", default="router", help="what clients call the model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=ranged(between(0, 65535), whole=True), default=8000)
    parser.add_argument("--api_key_env", help="environment variable that holds the key clients must send")
    parser.add_argument("--public_metrics", action="store_true", help="/metrics and /ui need no admin's key")
    parser.add_argument("--ui", action="store_true", help="a page to watch it by, at /ui")
    parser.add_argument("--keys", type=Path, help="several keys, each with budgets and a rate (YAML)")
    parser.add_argument("--spending", type=Path, help="file that keeps what --keys have spent; written every second")
    several = ranged(at_least(1), whole=True)
    parser.add_argument("--question_tokens", type=several, default=4096, help="of a question; longer ones get 413")
    parser.add_argument("--queue_tokens", type=several, default=65_536, help="that wait, of one key; then 429")
    parser.add_argument("--drain_seconds", type=ranged(at_least(0)), default=30.0, help="for requests, after SIGTERM")
    args = parser.parse_args(argv)
    _check_free(args.host, args.port)
    # of the extra `serve`, which `srpo route` does without
    from routers.serving.gate import GateLimits
    from routers.serving.lifecycle import ConnectionLimits
    from routers.serving.lifecycle import serve as serve_app
    from routers.serving.server import create_app, make_gate

    keys, tracing = make_keys(args), make_tracing()
    worker = make_worker(args, args.name, tracing)
    limits = GateLimits(question_tokens=args.question_tokens, queue_tokens=args.queue_tokens)
    gate = make_gate(worker, keys, limits)
    shown = {"public_metrics": args.public_metrics, "ui": args.ui}
    app = create_app(worker, name=args.name, gate=gate, **shown, tracing=tracing)
    set_imports_aside()
    serve_app(app, keys, host=args.host, port=args.port, limits=ConnectionLimits(drain=args.drain_seconds))


def make_tracing() -> Any:
    """`Tracing`, where OpenTelemetry's variables name a receiver; None: they do not, or say so, or it cannot be.

    The variables may be meant for every program of a machine, so what is missing here is said and ends nothing.
    """
    told = os.environ.get
    kind, off = told("OTEL_TRACES_EXPORTER", "otlp"), told("OTEL_SDK_DISABLED", "").lower() == "true"
    if off or kind == "none" or not any(told(name) for name in _RECEIVERS):
        return None
    protocol = told("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or told("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if (kind, protocol) != ("otlp", "http/protobuf"):
        why = f"the exporter is {kind} over {protocol}, and only otlp over http/protobuf is here"
    else:
        try:
            from routers.serving.tracing import Tracing
        except ImportError:
            why = "pip install 'srpo[otel]'"
        else:
            return Tracing()
    print(f"srpo serve: OTEL_EXPORTER_OTLP_ENDPOINT is set, and no spans are sent: {why}", file=sys.stderr)
    return None


def make_keys(args: argparse.Namespace) -> Any:
    """Who may ask (`Keys`), as the command line says.

    Raises:
        ValueError: options that do not go together, or a file that cannot be used.
    """
    from routers.serving.keys import Keys

    if args.keys and args.api_key_env:
        raise ValueError("give --keys (several) or --api_key_env (one), not both")
    if args.spending and not args.keys:
        raise ValueError("--spending keeps what the keys of --keys have spent: give --keys too")
    if args.keys:
        return Keys(args.keys, args.spending)
    if args.api_key_env is None:
        return Keys()
    key = os.environ.get(args.api_key_env)
    if not key:
        raise ValueError(f"environment variable {args.api_key_env} is not set; export the key clients must send")
    return Keys.single(key)


def _check_free(host: str, port: int) -> None:
    """ValueError where nobody can listen there, before a model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None
