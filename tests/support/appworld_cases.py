"""For tests that need AppWorld itself, which are skipped where it is not installed: a small world, and two models."""

import asyncio
import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from openai_server import OpenAIServer

PYTHON = os.environ.get("APPWORLD_PYTHON")
LOG_IN = """\
passwords = {a["account_name"]: a["password"] for a in apis.supervisor.show_account_passwords()}
token = apis.simple_note.login(username="ada@example.com", password=passwords["simple_note"])["access_token"]
(note,) = apis.simple_note.search_notes(access_token=token, query="shopping")
print(note["title"])"""
ADD = """\
for word in ["eggs"]:
    old = apis.simple_note.show_note(access_token=token, note_id=note["note_id"])["content"]
    print(apis.simple_note.update_note(access_token=token, note_id=note["note_id"], content=old + " " + word))"""
DONE = "apis.supervisor.complete_task()"


def next_code(model: str, prompt: str) -> str:
    """What a model writes next, from its prompt alone: `small` can answer the question, but not change the note."""
    if "How many things" in prompt:
        return "apis.supervisor.complete_task(answer=1)"
    if "Note updated" in prompt:
        return DONE
    if model == "small":
        return "print(apis.supervisor.show_profile())"
    return ADD if "\nShopping\n" in prompt else LOG_IN


class Models(OpenAIServer):
    """An endpoint of both."""

    async def _answer(
        self, headers: dict[str, str], body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        request = json.loads(body)
        code = next_code(request["model"], request["messages"][-1]["content"])
        self.reply = f"Thought: I go on.\nAction:\n```python\n{code}\n```\nObservation: so it goes"
        return await super()._answer(headers, body, reader, writer)


def make_world(folder: Path) -> None:
    """Put the data of `appworld_world` into a folder. Skips the test where APPWORLD_PYTHON is not set."""
    if PYTHON is None:
        pytest.skip("AppWorld is not installed: see routers/environments/appworld, and set APPWORLD_PYTHON")
    shutil.copytree(_made(), folder, dirs_exist_ok=True)


@functools.cache
def _made() -> Path:
    """Once per process: it takes ten seconds."""
    folder = Path(tempfile.mkdtemp())
    subprocess.run([str(PYTHON), str(Path(__file__).with_name("appworld_world.py")), str(folder)], check=True)
    return folder
