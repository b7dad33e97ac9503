"""Keys of the environment, which all who are sent one repeat, are in no file, log, card, cache, command line or push.

Whole runs as processes of their own, with their home, caches and temporary files in one folder, all of which is
searched, tables decoded; the command lines of all their processes are looked at meanwhile.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from hub_server import HubServer

from routers.data.table import quickstart_table

ROOT = Path(__file__).resolve().parents[2]
WORD = "c4n4ry"
KEYS = {
    "VENDOR_LOGIN": f"{WORD}-v3nd0r-91",  # named by the catalogue; no name or prefix says that it is a key
    "HF_TOKEN": f"hf_{WORD}7hub7hub7hub7hub7hub7hub",
    "WANDB_API_KEY": f"{WORD}5wandb5wandb5wandb5wandb5wandb5wandb",
    "OPENAI_API_KEY": f"sk-{WORD}1openai1openai1",
}
EVERY = 5
"""One in so many requests fails."""


class Echo:
    """A member's endpoint that repeats the key it is sent in every answer: text, error, address and header."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        echo = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                echo.keys.append(key)
                status = [200, 200, 200, 401, 500, 302][len(echo.keys) % 6] if len(echo.keys) % EVERY == 0 else 200
                said = f"Thought: {key}\nAction: look\nYour key is {key}; Authorization: Bearer {key}; 4"
                found: dict[str, Any] = {"error": {"message": f"{key} may not: https://u:{key}@host/?api_key={key}"}}
                if status == 200:
                    message = {"role": "assistant", "content": said}
                    found = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "id": key}
                    found["usage"] = {"prompt_tokens": 9, "completion_tokens": 9}
                body = json.dumps(found).encode()
                self.send_response(status, f"see {key}")
                self.send_header("Location", f"http://127.0.0.1:9/?key={key}")
                self.send_header("X-Request-Id", key)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.http.shutdown()
    server.http.server_close()


def run(folder: Path, hub: HubServer, *words: Any) -> tuple[int, str]:
    """`srpo ...` with everything that it may write in `folder`; its code, and what it said."""
    places = {name: folder / name.lower() for name in ("HOME", "TMPDIR", "HF_HOME", "WANDB_DIR", "XDG_CACHE_HOME")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    environment = {**os.environ, **KEYS, **{name: str(path) for name, path in places.items()}, "WANDB_MODE": "offline"}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with (folder / "said.log").open("ab") as log:
        command = [sys.executable, "-m", "srpo", *map(str, words)]
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        seen, watched = set(), psutil.Process(process.pid)
        while process.poll() is None:
            try:
                for one in (watched, *watched.children(recursive=True)):
                    seen.add(" ".join(one.cmdline()))
            except psutil.Error:
                pass
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    assert not [line for line in seen if WORD in line]
    return process.returncode, (folder / "said.log").read_text(errors="replace")


def found_in(folder: Path, hub: HubServer) -> list[str]:
    """Where the word stands."""
    places = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += pd.read_parquet(path).to_json(default_handler=str).encode()
        if WORD.encode() in content or WORD in path.name:
            places.append(str(path.relative_to(folder)))
    pushed = {**hub.files, **{f"request {i}": body for i, body in enumerate(hub.seen)}, **hub.blobs}
    return places + [name for name, content in pushed.items() if WORD.encode() in content]


def words_of(**given: Any) -> list[str]:
    words = []
    for key, value in given.items():
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def catalogue(folder: Path, url: str, names: list[str]) -> Path:
    member = {"descriptor": "x", "price_in": 1, "price_out": 2, "base_url": url, "api_key_env": "VENDOR_LOGIN"}
    path = folder / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"members": [{"name": name, "max_tokens": 64, **member} for name in names]}))
    return path


SMALL = {
    "max_steps": 2, "num_generations": 4, "per_device_train_batch_size": 8,
    "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": "true", "report_to": "wandb",
    "push_to_hub": "true", "hub_model_id": "me/router", "hub_strategy": "checkpoint",
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "think_route": (
        "quickstart/think_route",
        {
            "model_name_or_path": "tiny", "table": "quickstart", "pool": "endpoint", "gradient_accumulation_steps": 1,
            "members": ["fewshot", "calculator", "python"],
            "train_limit": 160, "heldout_limit": 4, "sft_epochs": 8, "sft_drills": 0, "agent_prompt": "{query}",
        },
    ),
    "step_routing": (
        str(ROOT / "recipes/Qwen2.5-1.5B-Instruct/bopo/alfworld.yaml"),
        {
            "model_name_or_path": "tiny", "train_tasks": "generated/train", "train_limit": 4, "step_limit": 6,
            "prompts_per_step": 2,
            "heldout_tasks": "generated/test", "heldout_limit": 2, "profile_runs": 2, "sft_epochs": 0,
            "heldout_caps": ["inf"], "max_cost_usd": 50, "bf16": "false", "gradient_checkpointing": "false",
            "concurrency": 8,
        },
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_key_is_anywhere_after_a_run_with_live_members(kind: str, tmp_path: Path, echo: Echo) -> None:
    recipe, given = KINDS[kind]
    names = given.get("members") or ["gpt-4.1-mini", "gpt-4.1"]
    given = {**SMALL, **given, "catalogue": catalogue(tmp_path, echo.url, names), "output_dir": tmp_path / "out"}
    with HubServer() as hub:
        hub.token = KEYS["HF_TOKEN"]
        code, said = run(tmp_path, hub, "train", recipe, *words_of(**given, reply_cache=tmp_path / "replies"))
        assert code == 0, said[-3000:]
        assert len(echo.keys) > EVERY and {*echo.keys} == {KEYS["VENDOR_LOGIN"]}
        assert "me/router:router.yaml" in hub.files and "me/router:last-checkpoint/manifest.json" in hub.files
        assert list(tmp_path.rglob("*.wandb")) and list((tmp_path / "replies").rglob("*"))
        hub.token = "another"  # the refusal repeats what was sent
        code, said = run(tmp_path, hub, "push", tmp_path / "out", "me/router")
        assert code == 2 and "the Hub refused the credentials (HTTP 401)" in said
        assert found_in(tmp_path, hub) == []


@pytest.mark.slow
def test_no_key_is_anywhere_after_recording_a_pool_and_training_an_encoder(tmp_path: Path, echo: Echo) -> None:
    rows = [{"query_id": f"q{i}", "query": row["query"], "gold": "4"} for i, row in enumerate(queries(24))]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = catalogue(tmp_path, echo.url, ["a", "b"])
    with HubServer() as hub:
        hub.token = KEYS["HF_TOKEN"]
        asked = {
            "catalogue": pool,
            "queries": tmp_path / "queries.jsonl",
            "grade": "em",
            "output": tmp_path / "table/t.parquet",
        }
        run(tmp_path, hub, "record", *words_of(**asked))
        assert {*echo.keys} == {KEYS["VENDOR_LOGIN"]} and list((tmp_path / "table").rglob("*.parquet"))
        given = {"output_dir": tmp_path / "out", "push_to_hub": "true", "hub_model_id": "me/router"}
        code, said = run(tmp_path, hub, "train", "quickstart/encoder", *words_of(**given))
        assert code == 0 and "me/router:model.safetensors" in hub.files, said[-3000:]
        assert found_in(tmp_path, hub) == []


def queries(count: int) -> list[dict[str, Any]]:
    return quickstart_table().queries("train")[:count]
