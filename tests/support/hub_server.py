"""A server on loopback that speaks what huggingface_hub needs to create a repository and upload a folder over LFS.

`mode` makes it fail: "ok", an HTTP status (401, 500, ...) for every request, or "dies": it creates the repository and
answers everything after that with 500.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """Use as a context manager; `endpoint` is what HF_ENDPOINT must be."""

    def __init__(self) -> None:
        self.mode: str | int = "ok"
        self.files: dict[str, bytes] = {}  # "owner/name:path" -> content, as committed
        self.blobs: dict[str, bytes] = {}  # sha256 -> content, as uploaded
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.handle(self)

            do_GET = do_PUT = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.split("?")[0]
        self.requests.append(f"{request.command} {path}")
        self.bodies.append(body)
        if isinstance(self.mode, int):
            return self.answer(request, self.mode, {"error": f"you asked for {self.mode}"})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            return self.answer(request, 200, {"url": f"{self.endpoint}/{repo}", "name": repo})
        if self.mode == "dies":
            return self.answer(request, 500, {"error": "out of order"})
        if path == "/api/validate-yaml":
            return self.answer(request, 200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            return self.answer(request, 200, {"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.endpoint}/blob/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(request, 200, {"transfer": "basic", "objects": objects})
        if path.startswith("/blob/"):
            digest = hashlib.sha256(body).hexdigest()
            if digest != path.removeprefix("/blob/"):
                return self.answer(request, 400, {"error": "the content does not have the promised sha256"})
            self.blobs[digest] = body
            return self.answer(request, 200, {})
        if "/commit/" in path:
            repo = "/".join(path.split("/")[3:5])
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    self.messages.append(value["summary"])
                elif entry["key"] == "file":
                    self.files[f"{repo}:{value['path']}"] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.files[f"{repo}:{value['path']}"] = self.blobs[value["oid"]]
            commit = {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.endpoint}/{repo}/commit/{'c' * 40}"}
            return self.answer(request, 200, commit)
        return self.answer(request, 404, {"error": f"this test server does not know {path}"})

    def answer(self, request: BaseHTTPRequestHandler, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)
