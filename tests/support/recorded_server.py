"""The quickstart's recorded replies behind OpenAI's protocol, on loopback: what a table says, a real client gets.

    python support/recorded_server.py --catalogue endpoints.yaml     # writes the catalogue, serves until it is stopped

Clients send the question alone (`--agent_prompt "{query}"`); the reported usage is the recorded one, so that costs are
equal to the cent. A question that is not in the table is answered with status 404.
"""

import argparse
import json
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from routers.data.table import ReplyTable, normalise_query, quickstart_table
from routers.tasks.think_route.sft_rows import restricted, result_of


class RecordedServer:
    """Serves a table on a thread; `usage` lists (member, prompt tokens, completion tokens) of every reply."""

    def __init__(self, table: ReplyTable, port: int = 0) -> None:
        self.table = table
        self.usage: list[tuple[str, int, int]] = []
        ids = {normalise_query(query["query"]): query["query_id"] for query in table.queries()}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = ids.get(normalise_query(request["messages"][-1]["content"]))
                if question is None:
                    return self._send(404, {"error": {"message": "this question was not recorded"}})
                found = table.lookup(question, request["model"])
                tokens = {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.completion_tokens}
                server.usage.append((request["model"], found.prompt_tokens, found.completion_tokens))
                message = {"index": 0, "message": {"role": "assistant", "content": found.reply}}
                self._send(200, {"choices": [{**message, "finish_reason": "stop"}], "usage": tokens})

            def _send(self, status: int, document: dict[str, Any]) -> None:
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "RecordedServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def write_catalogue(self, path: Path) -> Path:
        """A catalogue whose members live here, at the prices of the table."""
        names = ("name", "descriptor", "price_in", "price_out")
        members = []
        for member in self.table.catalogue.values():
            found = [self.table.lookup(query["query_id"], member.name) for query in self.table.queries()]
            # Recorded prompts hold what this pool's do not (examples of fewshot): without these bounds such a usage
            # would not be possible, and less of it billed.
            bounds = {
                "extra_prompt_tokens": max(reply.prompt_tokens for reply in found),
                "max_tokens": max(512, *(reply.completion_tokens for reply in found)),
            }
            own = {name: asdict(member)[name] for name in names}
            members.append({**own, **bounds, "base_url": self.url})
        path.write_text(yaml.safe_dump({"members": members}))
        return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalogue", type=Path, required=True)
    with RecordedServer(restricted(quickstart_table(), rewrite=result_of)) as running:
        running.write_catalogue(parser.parse_args().catalogue)
        print(running.url, flush=True)
        threading.Event().wait()
