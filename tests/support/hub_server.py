"""A server on loopback that speaks the Hub's API to huggingface_hub's own client, keeps what it is sent, and fails on
demand, at any kind of request.

    whoami create branch info tree validate preupload batch put verify commit resolve        kinds of requests
    503, (429, {"Retry-After": "1"})    the request is answered so, and has done nothing
    DROP     the connection is closed before anything is done
    LOST     it is done, and the connection is closed without an answer
    CUT      it is done, and the connection breaks in the middle of the answer
    SILENT   no answer, for as long as the server lives
    WRONG    put, commit: other bytes are kept than were sent
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DROP, LOST, CUT, SILENT, WRONG = "drop", "lost", "cut", "silent", "wrong"
Fault = int | str | tuple[int, Mapping[str, str]]
_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    "whoami": r"/api/whoami-v2",
    "create": r"/api/repos/create",
    "validate": r"/api/validate-yaml",
    "branch": _MODEL + r"/branch/(?P<rev>[^/]+)",
    "preupload": _MODEL + r"/preupload/(?P<rev>[^/]+)",
    "commit": _MODEL + r"/commit/(?P<rev>[^/]+)",
    "tree": _MODEL + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?",
    "info": _MODEL + r"(?:/revision/(?P<rev>[^/]+))?",
    "batch": r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "put": r"/blob/(?P<oid>\w+)",
    "verify": r"/verify",
    "resolve": r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)",
}
_LFS = (".safetensors", ".pt", ".pth", ".png")


class HubServer:
    """Use as a context manager; `endpoint` is what HF_ENDPOINT must be.

    Attributes:
        faults: kind of request -> what becomes of the next ones, in order; then all is well.
        always: kind ("*": any) -> what becomes of every one.
        token: which requests must carry; None: any will do.
    """

    def __init__(self) -> None:
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.token: str | None = None
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}  # repo -> branch -> path -> content
        self.commits: dict[str, list[str]] = {}
        self.blobs: dict[str, bytes] = {}  # sha256 -> content, as uploaded
        self.messages: list[str] = []
        self.kinds: list[str] = []
        self.seen: list[bytes] = []
        """Request lines and bodies."""
        self.lock, self.closed = threading.RLock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.handle(self)

            do_GET = do_PUT = do_HEAD = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        self.closed.set()
        self.http.shutdown()
        self.http.server_close()

    def reset(self) -> None:
        """As new."""
        for kept in (self.faults, self.always, self.branches, self.commits, self.blobs):
            kept.clear()
        for told in (self.messages, self.kinds, self.seen):
            told.clear()

    @property
    def files(self) -> dict[str, bytes]:
        """ "owner/name:path" -> content, of main."""
        found = {name: branches.get("main", {}) for name, branches in self.branches.items()}
        return {f"{name}:{path}": content for name, files in found.items() for path, content in files.items()}

    def count(self) -> Counter[str]:
        """Requests by kind."""
        return Counter(self.kinds)

    # --------------------------------------------------------------------------------------------------- requests

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            while size := int(request.rfile.readline(), 16):
                body += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
        path = request.path.split("?")[0]
        kind, found = next(
            ((kind, match) for kind, route in ROUTES.items() if (match := re.fullmatch(route, path))), ("?", None)
        )
        with self.lock:
            self.kinds.append(kind)
            self.seen += [f"{request.command} {request.path}".encode(), body]
            fault = self.faults[kind].pop(0) if self.faults[kind] else self.always.get(kind, self.always.get("*"))
        if found is None:
            return self.answer(request, 404, {"error": f"this test server does not know {path}"})
        if fault == SILENT:
            self.closed.wait()
        if fault in (DROP, SILENT):
            return self.hang_up(request)
        if isinstance(fault, (int, tuple)):
            status, headers = (fault, {}) if isinstance(fault, int) else fault
            return self.answer(request, status, {"error": f"you asked for {status}"}, headers)
        if self.token is not None and kind != "put" and request.headers.get("Authorization") != f"Bearer {self.token}":
            told = {"error": f"{request.headers.get('Authorization')} is not valid"}  # echoed, as some servers do
            return self.answer(request, 401, told)
        with self.lock:
            status, content, headers = getattr(self, kind)(request, body, fault == WRONG, **found.groupdict())
        if fault == LOST:
            return self.hang_up(request)
        return self.answer(request, status, content, headers, cut=fault == CUT)

    def hang_up(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.connection.close()

    def answer(
        self, request: Any, status: int, content: Any, headers: Mapping[str, str] | None = None, cut: bool = False
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        told = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in told.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            request.wfile.flush()
            self.hang_up(request)

    # ------------------------------------------------------------------------------------------- kinds of requests

    def whoami(self, request: Any, body: bytes, wrong: bool) -> Any:
        return 200, {"type": "user", "name": "tester", "orgs": []}, None

    def validate(self, request: Any, body: bytes, wrong: bool) -> Any:
        return 200, {"errors": [], "warnings": []}, None

    def create(self, request: Any, body: bytes, wrong: bool) -> Any:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        told = {"url": f"{self.endpoint}/{repo}", "name": repo}
        if repo in self.branches:
            return 409, {**told, "error": "You already created this model repo"}, None
        self.branches[repo] = {"main": {}}
        self.commits[repo] = ["0" * 40]
        return 200, told, None

    def branch(self, request: Any, body: bytes, wrong: bool, repo: str, rev: str) -> Any:
        self.branches[repo].setdefault(rev, dict(self.branches[repo]["main"]))
        return 200, {}, None

    def info(self, request: Any, body: bytes, wrong: bool, repo: str, rev: str | None) -> Any:
        if (bad := self.unknown(repo, rev)) is not None:
            return bad
        files = [self.described(path, content) for path, content in self.of(repo, rev).items()]
        siblings = [{"rfilename": one.pop("path"), "blobId": one.pop("oid"), **one} for one in files]
        return 200, {"id": repo, "modelId": repo, "sha": self.commits[repo][-1], "siblings": siblings}, None

    def tree(self, request: Any, body: bytes, wrong: bool, repo: str, rev: str, path: str | None) -> Any:
        if (bad := self.unknown(repo, rev)) is not None:
            return bad
        below = f"{path}/" if path else ""
        found = [self.described(name, data) for name, data in self.of(repo, rev).items() if name.startswith(below)]
        if path and not found:
            return 404, {"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"}
        return 200, [{"type": "file", **one} for one in found], None

    def preupload(self, request: Any, body: bytes, wrong: bool, repo: str, rev: str) -> Any:
        if (bad := self.unknown(repo, rev)) is not None:
            return bad
        files = []
        for one in json.loads(body)["files"]:
            known = self.of(repo, rev).get(one["path"])
            mode = "lfs" if one["path"].endswith(_LFS) else "regular"
            oid = None if known is None or mode == "lfs" else git_oid(known)
            files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, None

    def batch(self, request: Any, body: bytes, wrong: bool, repo: str) -> Any:
        objects: list[dict[str, Any]] = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.blobs:
                how = {"href": f"{self.endpoint}/blob/{one['oid']}", "header": {}}
                one["actions"] = {"upload": how, "verify": {"href": f"{self.endpoint}/verify", "header": {}}}
        return 200, {"transfer": "basic", "objects": objects}, None

    def put(self, request: Any, body: bytes, wrong: bool, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content does not have the promised sha256"}, None
        self.blobs[oid] = b"other bytes" if wrong else body
        return 200, {}, None

    def verify(self, request: Any, body: bytes, wrong: bool) -> Any:
        return (200 if json.loads(body)["oid"] in self.blobs else 404), {}, None

    def commit(self, request: Any, body: bytes, wrong: bool, repo: str, rev: str) -> Any:
        if (bad := self.unknown(repo, rev)) is not None:
            return bad
        files = self.of(repo, rev)
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = b"other" if wrong else base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        oid = hashlib.sha1(body + str(len(self.messages)).encode()).hexdigest()
        self.commits[repo].append(oid)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}, None

    def resolve(self, request: Any, body: bytes, wrong: bool, repo: str, rev: str, path: str) -> Any:
        if (bad := self.unknown(repo, rev)) is not None:
            return bad
        content = self.of(repo, rev).get(path)
        commit = {"X-Repo-Commit": self.commits[repo][-1]}
        if content is None:
            return 404, {"error": "Entry not found"}, {**commit, "X-Error-Code": "EntryNotFound"}
        return 200, content, {**commit, "ETag": f'"{git_oid(content)}"', "Content-Type": "application/octet-stream"}

    # ------------------------------------------------------------------------------------------------------- files

    def unknown(self, repo: str, rev: str | None) -> Any:
        if repo not in self.branches:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if rev is not None and rev not in self.branches[repo] and rev not in self.commits[repo]:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        return None

    def of(self, repo: str, rev: str | None) -> dict[str, bytes]:
        """Of a commit: those of main, as it is now."""
        branches = self.branches[repo]
        return branches[rev if rev in branches else "main"]

    def described(self, path: str, content: bytes) -> dict[str, Any]:
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        more = {"lfs": {**lfs, "oid": lfs["sha256"]}} if path.endswith(_LFS) else {}
        return {"path": path, "size": len(content), "oid": git_oid(content), **more}


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
