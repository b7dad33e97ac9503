"""The page to watch a server by: what it is told, and what a real browser makes of it."""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import browsed, needs_chromium
from chat_server import ChatServer, Said, said, usage
from serving_helpers import Proxied, proxied, until

from routers.serving.keys import Keys

HOSTILE = "<img src=x onerror=alert(1)>"
DOWN = "the member's own words, which are not shown"


@pytest.fixture(scope="module")
def served() -> Iterator[Proxied]:
    dear = {"price_in": 10_000.0, "price_out": 0.0}
    with (
        ChatServer(said("small says", usage(30, 4))) as small,
        ChatServer(said("x", usage(10, 1))) as large,
        proxied({"small": (small, dear), HOSTILE: (large, {})}, ui=True) as running,
    ):
        running.post({"messages": [{"role": "user", "content": "small, please"}]})
        large.replies = [Said(status=400, body=f'{{"error": {{"message": "{DOWN}"}}}}'.encode())]
        running.post({"messages": [{"role": "user", "content": HOSTILE}]})
        running.post({"messages": [{"role": "user", "content": "nobody"}]})
        running.post({"stream": True, "messages": [{"role": "user", "content": "small"}]})
        until(lambda: len(httpx.get(f"{running.address}/ui/decisions").json()) == 4)
        yield running


def test_what_was_decided_the_newest_first(served: Proxied) -> None:
    reply = httpx.get(f"{served.address}/ui/decisions")
    found = reply.json()
    assert [one["status"] for one in found] == [200, 422, 400, 200]
    assert [one["member"] for one in found] == ["small", None, None, "small"]
    assert found[2]["tried"] == [{"member": HOSTILE}] and DOWN not in reply.text
    assert found[3]["cost_usd"] == 0.3 and found[3]["scores"] == {"small": 0.5, HOSTILE: 0.25}
    assert all(one["key"] == "anyone" and one["seconds"] >= 0 for one in found)


def test_the_page_may_run_itself_and_ask_this_server_only(served: Proxied) -> None:
    reply = httpx.get(f"{served.address}/ui")
    policy = reply.headers["content-security-policy"]
    for part in ("script", "style"):
        [own] = re.findall(f"<{part}>(.*?)</{part}>", reply.text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(own.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.search(r"(src|href)=", reply.text)
    assert re.findall(r"https?://[^\"]*", reply.text) == ["http://www.w3.org/2000/svg"] * 2


def test_without_a_key_it_shows_nothing() -> None:
    member, keys = ChatServer(said("x", usage(1, 1))), Keys.single("secret")
    with member, proxied({"small": (member, {})}, keys=keys, ui=True) as running:
        assert httpx.get(f"{running.address}/ui").status_code == 200
        assert httpx.get(f"{running.address}/ui/decisions").status_code == 401
        heads = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{running.address}/ui/decisions", headers=heads).json() == []


def test_the_numbers_of_the_whole_server_are_for_admins(tmp_path: Path) -> None:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("boss", "team")}
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: {{a: {{sha256: {digests['boss']}, admin: true}}, b: {{sha256: {digests['team']}}}}}")
    with (
        ChatServer(said("x", usage(1, 1))) as member,
        proxied({"small": (member, {})}, keys=Keys(path), ui=True) as running,
    ):
        for page in ("metrics", "ui/decisions"):
            seen = {
                name: httpx.get(f"{running.address}/{page}", headers={"Authorization": f"Bearer {name}"})
                for name in digests
            }
            assert seen["boss"].status_code == 200 and seen["team"].status_code == 403
            assert "`admin: true`" in seen["team"].json()["error"]["message"]


def test_there_is_none_unless_it_is_asked_for() -> None:
    with ChatServer(said("x", usage(1, 1))) as member, proxied({"small": (member, {})}) as running:
        assert httpx.get(f"{running.address}/ui").status_code == 404


@needs_chromium
def test_in_a_browser(served: Proxied, tmp_path: Path) -> None:
    """What the members did, in a real browser, with a name that would be a picture if it were HTML; and no error."""
    page, console = browsed(f"{served.address}/ui", tmp_path, "--virtual-time-budget=4000")
    assert console == [] and "live, " in page, page[-2000:]
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [[re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", row)] for row in rows]
    by_member = {row[0]: row for row in cells if len(row) == 10}
    assert by_member["small"][2:5] == ["50.0 %", "2", "0"] and by_member["small"][8] == "$0.6"
    shown = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
    assert by_member[shown][2:5] == ["25.0 %", "1", "1"] and by_member["(abstained)"][2] == "25.0 %"
    assert [row[2] for row in cells if len(row) == 8] == ["small", "-", "-", "small"]
