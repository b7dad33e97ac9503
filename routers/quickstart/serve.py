"""The quickstart's members as endpoints: to serve its router in front of them, and to record or train with.

    python -m routers.quickstart.serve members --port 8001     # all five; a request's `model` says which
    python -m routers.quickstart.serve vllm --port 8002        # SmolLM2-135M-Instruct behind vLLM, for a CPU
    srpo serve outputs/quickstart/router --catalogue recipes/catalogues/quickstart_live.yaml --ui

A member of `members` reads the last message of a conversation, if it is the user's, and answers greedily and whole,
as it was recorded; what it cannot do (tools, several replies, shorter ones) is a 400 that says so. Further options go
on to vLLM. Both need the extra `quickstart`, the first `serve` too; `bash scripts/setup.sh --vllm` makes an
environment with a vLLM. Stop them with Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from srpo.ranges import between, ranged

_READ = {"model", "messages", "stream", "stream_options", "temperature", "top_p", "seed", "max_tokens"}
LONGEST = 48
"""Tokens that the most talkative of the members writes at most."""
_ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_WAIT_POLICY": "PASSIVE",  # on a busy machine, threads that spin while they wait make it several times slower
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes cores of its own, which others may be using
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process
    "VLLM_NO_USAGE_STATS": "1",
}


def members_app(model: Any) -> Any:
    """The five members behind `/v1/chat/completions`, on one `members.lm.LanguageModel`."""
    from fastapi import Body, FastAPI
    from fastapi.responses import JSONResponse

    from routers.quickstart.members import MEMBERS

    app, one_at_a_time = FastAPI(title="quickstart members"), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    def complete(body: dict[str, Any] = Body()) -> Any:  # noqa: B008  # how FastAPI declares it
        name, messages = str(body.get("model")), body.get("messages")
        query: Any = messages[-1] if isinstance(messages, list) and messages else None
        question: Any = _words(query)
        problem = ""
        if name not in MEMBERS:
            problem = f"there is no model {name!r}; there are {', '.join(MEMBERS)}"
        elif unknown := [field for field, value in body.items() if field not in _READ and value is not None]:
            problem = f"{name} does not take {unknown[0]!r}"
        elif (body.get("max_tokens") or LONGEST) < LONGEST:
            problem = f"{name} writes up to {LONGEST} tokens, and cannot be cut: let max_tokens be at least that"
        elif question is None:
            problem = f"{name} answers the last message, which must be the user's and nothing but text"
        if problem:
            return JSONResponse({"error": {"message": problem, "type": "invalid_request_error"}}, 400)
        with one_at_a_time:
            [said] = MEMBERS[name](model, [question])
        read, wrote = said.prompt_tokens, said.completion_tokens
        return {
            "id": f"chatcmpl-{time.time_ns()}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": said.reply}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote},
        }

    return app


def _words(message: Any) -> str | None:
    """What a message of the user's says; None: it is no such message, or more than text."""
    if not isinstance(message, dict) or message.get("role") != "user":
        return None
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    listed = parts if isinstance(parts, list) else []
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in listed]
    return "\n".join(texts) if texts and all(isinstance(text, str) for text in texts) else None


def vllm_command(weights: Path, port: int, more: Sequence[str] = ()) -> list[str]:
    """vLLM's server of the model in a folder; the `vllm` command of its CPU build does not start."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights)]
    command += ["--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    return [*command, "--max-num-seqs", "16", "--host", "127.0.0.1", "--port", str(port), *more]


def unpack(weights: Path) -> None:
    """SmolLM2 in a folder as `from_pretrained` reads it, unless it is there already: half a minute, 270 MB."""
    if weights.is_dir():
        return
    print(f"unpacking SmolLM2 into {weights}: half a minute, once", flush=True)
    import torch

    from routers.quickstart.smollm2 import smollm2

    weights.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=weights.parent) as folder:
        smollm2.convert(Path(folder, "whole"), torch.bfloat16)
        with suppress(OSError):  # somebody else was quicker
            Path(folder, "whole").rename(weights)


def language_model(weights: Path) -> Any:
    """What the members use, out of that folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from routers.quickstart.members.lm import LanguageModel

    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16)
    return LanguageModel(model, AutoTokenizer.from_pretrained(weights))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=("members", "vllm"))
    parser.add_argument("--port", type=ranged(between(1, 65535), whole=True), required=True)
    parser.add_argument(
        "--weights", type=Path, default=Path("outputs/smollm2"), help="where SmolLM2 is unpacked, once"
    )
    args, more = parser.parse_known_args(argv)
    if more and args.what == "members":
        parser.error(f"unknown words: {' '.join(more)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    unpack(args.weights)
    if args.what == "vllm":
        command = vllm_command(args.weights, args.port, more)
        print(f"starting vLLM on http://127.0.0.1:{args.port}/v1: a minute or two on a CPU", flush=True)
        os.execve(command[0], command, {**_ENGINE, **os.environ})
    import uvicorn

    app = members_app(language_model(args.weights))
    print(f"serving on http://127.0.0.1:{args.port}/v1", flush=True)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    from srpo.cli import run

    run(main)
