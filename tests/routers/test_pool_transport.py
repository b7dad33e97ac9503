"""Bodies without end and redirects, against a real server: what is read has a bound, and the key stays at home."""

import asyncio
import json
import resource
import time
import zlib
from typing import Any

import pytest
from openai_server import Fault, OpenAIServer

from routers.data.catalogue import Member
from routers.pool import Pool, Retry, kind, live_pool
from routers.pool.transport import LONGEST_BODY, MOST_REDIRECTS
from srpo.types import Reply

KEY = "sk-canary-1b2c3d4e5f"
GOOD = json.dumps({"choices": [{"message": {"content": "Herbert"}, "finish_reason": "stop"}]}).encode()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("POOL_TEST_KEY", KEY)
    with OpenAIServer() as running:
        yield running


def ask(server: OpenAIServer, fault: Fault | None = None, deadline: float = 10.0, **fields: Any) -> Reply:
    server.always = fault or server.always
    fields = {"base_url": server.url, "api_key_env": "POOL_TEST_KEY", **fields}
    pool = live_pool({"a": Member("a", "x", 1.0, 2.0, **fields)}, retry=Retry(base=0.01))

    async def main(pool: Pool) -> Reply:
        async with pool:
            return await pool.ask("a", "who?", deadline)

    return asyncio.run(main(pool))


def packed(how: str, body: bytes = GOOD) -> Fault:
    bits = {"deflate": zlib.MAX_WBITS, "raw deflate": -zlib.MAX_WBITS, "br": 0, "zstd": 0, "rot13": 0, "identity": 0}
    for bits_of_one in [bits.get(one, zlib.MAX_WBITS | 16) for one in how.split(", ")]:
        packer = zlib.compressobj(1, wbits=bits_of_one) if bits_of_one else None
        body = body if packer is None else packer.compress(body) + packer.flush()
    return Fault(raw=body, headers=(("Content-Encoding", how.removeprefix("raw ")),))


@pytest.mark.parametrize("how", ["gzip", "x-gzip", "deflate", "raw deflate", "identity"])
def test_packed_bodies_are_read(server, how):
    assert ask(server, packed(how)).text == "Herbert"


@pytest.mark.parametrize("how", ["br", "zstd", "gzip, gzip", "rot13"])
def test_a_packing_that_nobody_asked_for_is_named(server, how):
    reply = ask(server, packed(how))
    assert kind(reply) == "malformed reply" and how in reply.error and len(server.requests) == 1


@pytest.mark.parametrize("cut", [slice(0, -9), slice(5, None), slice(0, 4)])
def test_a_damaged_packing_is_tried_again(server, cut):
    whole = packed("gzip")
    server.faults = [Fault(raw=whole.raw[cut], headers=whole.headers)]
    assert ask(server, whole).text == "Herbert" and len(server.requests) == 2


@pytest.mark.parametrize("how", ["gzip", "deflate", "raw deflate"])
def test_a_bomb_is_not_unpacked(server, how):
    bomb = packed(how, bytes(128 * 2**20))  # half a MiB that unpacks to 128
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    reply = ask(server, bomb)
    assert reply.error == f"malformed reply: the body is longer than {LONGEST_BODY // 2**20} MiB"
    assert len(server.requests) == 1 and time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # in KiB


@pytest.mark.parametrize("declared", [True, False])
def test_a_long_body_is_not_read_to_its_end(server, declared):
    body = json.dumps({"choices": [{"message": {"content": "x" * LONGEST_BODY}}]}).encode()
    fault = Fault(raw=body) if declared else packed("identity", body)
    reply = ask(server, fault)
    assert "longer than" in reply.error and len(server.requests) == 1


def test_a_long_reply_within_the_bound_is_whole(server):
    words = "x" * (LONGEST_BODY - 1000)
    body = json.dumps({"choices": [{"message": {"content": words}}]}).encode()
    assert ask(server, Fault(raw=body)).text == words


def test_a_status_counts_also_with_a_body_that_is_not_taken(server):
    server.faults = [Fault(status=503, raw=b"x" * (LONGEST_BODY + 1))]
    assert ask(server, Fault()).error is None and len(server.requests) == 2


def test_a_body_that_drips_ends_with_the_timeout(server):
    reply = ask(server, Fault(slow=0.05), deadline=1.0, timeout=0.4)
    assert kind(reply) == "timeout" and reply.seconds < 3


# -------------------------------------------------------------------------------------------------------- redirects


def to(address: str, status: int = 307) -> Fault:
    return Fault(status=status, headers=(("Location", address),))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "address", ["{other}/chat/completions", "//127.0.0.2:{port}/v1", "https://127.0.0.1:{port}/v1"]
)
def test_neither_key_nor_question_go_to_another_host_port_or_scheme(server, status, address):
    with OpenAIServer() as other:
        port = server.url.split(":")[2].split("/")[0]
        reply = ask(server, to(address.format(other=other.url, port=port), status))
        assert kind(reply) == "bad request" and "redirect" in reply.error and "base_url" in reply.error
        assert len(server.requests) == 1 and not other.requests


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("address", ["/v2/chat/completions", "../chat2", "{url}/elsewhere"])
def test_the_same_request_goes_on_at_the_same_host(server, status, address):
    server.faults = [to(address.format(url=server.url), status)]
    assert ask(server).text == "a plain reply"
    first, second = server.requests
    assert first["path"] == "/v1/chat/completions" != second["path"]
    assert {**first, "path": ""} == {**second, "path": ""} and second["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "fault",
    [Fault(status=302), to("http://[", 302), to("/v2", 303), to("file:///etc/passwd"), Fault(status=304, raw=b"")],
)
def test_a_redirect_to_nowhere_is_told(server, fault):
    reply = ask(server, fault)
    assert kind(reply) == "bad request" and str(fault.status) in reply.error and len(server.requests) == 1


def test_redirects_in_a_circle_end(server):
    reply = ask(server, to("/v1/chat/completions"))
    assert kind(reply) == "bad request" and f"more than {MOST_REDIRECTS} redirects" in reply.error
    assert len(server.requests) == MOST_REDIRECTS + 1


# ----------------------------------------------------------------------------------------------------- addresses, keys


def test_the_query_of_a_base_url_is_kept(server):
    assert ask(server, base_url=f"{server.url}/?api-version=2").error is None
    assert server.requests[0]["path"] == "/v1/chat/completions?api-version=2"


def test_variables_of_another_service_are_not_sent(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "somebody-elses")
    assert ask(server, api_key_env=None).error is None
    assert server.requests[0]["authorization"] is None and "somebody-elses" not in str(server.headers)


def test_white_space_around_a_key_is_not_sent_and_inside_is_told(server, monkeypatch):
    monkeypatch.setenv("POOL_TEST_KEY", f" {KEY}\r\n")
    assert ask(server).error is None and server.requests[0]["authorization"] == f"Bearer {KEY}"
    for bad in (f"{KEY}\nX-Other: 1", f"two {KEY}", f"{KEY}…"):
        monkeypatch.setenv("POOL_TEST_KEY", bad)
        with pytest.raises(ValueError, match=r"'a'.*POOL_TEST_KEY") as caught:
            ask(server)
        assert KEY not in str(caught.value)


def test_no_part_of_a_key_is_left_where_an_error_is_cut(server):
    for length in range(150, 200, 7):
        reply = ask(
            server, Fault(status=400, raw=b"x" * length + KEY.encode(), headers=(("Content-Type", "text/html"),))
        )
        assert "sk-" not in reply.error
