"""`srpo prices`: what a newer table of litellm's changes, and that nonsense changes nothing."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from routers.data.catalogue import load_catalogue
from routers.data.prices_command import refreshed
from srpo.cli import main

# Entries in litellm's own form, with what it says beside prices.
SONNET = {
    "cache_creation_input_token_cost": 3.75e-06,
    "cache_creation_input_token_cost_above_1hr": 6e-06,
    "cache_creation_input_token_cost_batches": 1.875e-06,
    "cache_read_input_token_cost": 3e-07,
    "input_cost_per_token": 3e-06,
    "input_cost_per_token_batches": 1.5e-06,
    "litellm_provider": "anthropic",
    "max_input_tokens": 200000,
    "max_output_tokens": 64000,
    "mode": "chat",
    "output_cost_per_token": 1.5e-05,
    "prompt_cache_min_tokens": 1024,
    "search_context_cost_per_query": {"search_context_size_high": 0.01, "search_context_size_low": 0.01},
    "source": "https://platform.claude.com/docs/en/about-claude/pricing",
    "supports_prompt_caching": True,
}
DEEPSEEK = {
    "cache_creation_input_token_cost": 0.0,
    "cache_read_input_token_cost": 2.8e-08,
    "input_cost_per_token": 2.8e-07,
    "input_cost_per_token_cache_hit": 2.8e-08,
    "litellm_provider": "deepseek",
    "max_input_tokens": 131072,
    "mode": "chat",
    "output_cost_per_token": 4.2e-07,
}
TABLE = {"sample_spec": {"mode": "one of: chat, embedding"}, "claude": SONNET, "deepseek/chat": DEEPSEEK}
POOL = """price_table: prices.json
members:
  - {name: dear, descriptor: x, price_from: 'litellm:claude', cache_seconds: 300}  # a comment
  - {name: cheap, descriptor: x, price_from: 'litellm:deepseek/chat', price_out: 0.5}
  - {name: own, descriptor: x, price_in: 1, price_out: 2}
"""
NEWER = {**SONNET, "input_cost_per_token": 2e-06, "input_cost_per_token_above_200k_tokens": 4e-06}
NEWER |= {"cache_creation_input_token_cost_above_1hr": 4e-06, "output_cost_per_token": 1e-05}


@pytest.fixture
def pool(tmp_path):
    (tmp_path / "prices.json").write_text(json.dumps({**TABLE, "of another catalogue": DEEPSEEK}))
    (tmp_path / "pool.yaml").write_text(POOL)
    return tmp_path / "pool.yaml"


def newer(pool, **entries):
    path = pool.with_name("newer.json")
    path.write_text(json.dumps({**TABLE, **entries}))
    return str(path)


def ran(capsys, *words):
    argv = sys.argv
    try:
        main(["prices", *map(str, words)])
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return code, out, err


def test_a_diff_is_shown_and_kept_only_when_asked(pool, capsys):
    source, before = newer(pool, claude=NEWER), pool.with_name("prices.json").read_text()
    code, out, _ = ran(capsys, "refresh", pool, "--source", source)
    lines = out.splitlines()
    assert code == 0 and lines[0] == "dear (litellm:claude)"
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:5]}
    assert told == {
        "price_in": "3 -> 2  (-33.3 %)",
        "price_out": "15 -> 10  (-33.3 %)",
        "price_cache_write_1h": "6 -> 4  (-33.3 %)",
        "price_tiers": "- -> 200000: in 4 out 10",
    }
    assert lines[5:7] == ["cheap (litellm:deepseek/chat): unchanged", "without price_from, left as they are: own"]
    assert lines[7].startswith("1 of 3 members change. Nothing is written")
    assert pool.with_name("prices.json").read_text() == before

    code, out, _ = ran(capsys, "refresh", pool, "--source", source, "--write")
    assert code == 0 and "1 of 3 members change; written to" in out and "does not read it yet" not in out
    kept = json.loads(pool.with_name("prices.json").read_text())
    assert kept["claude"] == NEWER and kept["of another catalogue"] == DEEPSEEK  # nothing else is touched
    members = load_catalogue(pool)
    assert (members["dear"].price_in, members["dear"].price_cache_write_1h, members["dear"].cache_seconds) == (
        2,
        4,
        300,
    )
    assert members["cheap"].price_out == 0.5 and members["cheap"].price_cache_write is None
    assert pool.read_text() == POOL and [p.name for p in pool.parent.glob("*.draft")] == []
    assert "0 of 3 members change" in refreshed(pool, source)


def test_a_first_table_and_one_beside(pool, capsys):
    pool.with_name("prices.json").unlink()
    source, out = newer(pool), pool.with_name("kept") / "table.json"
    told = refreshed(pool, source, out, write=True)
    assert "price_in             - -> 3" in told and "2 of 3 members change" in told
    assert told.endswith("pool.yaml does not read it yet: write price_table: kept/table.json")
    assert set(json.loads(out.read_text())) == {"claude", "deepseek/chat"}
    pool.write_text(POOL.replace("price_table: prices.json\n", ""))
    code, _, err = ran(capsys, "refresh", pool, "--source", source, "--write")
    assert code == 2 and "names no price_table to write" in err


def test_a_member_whose_old_entry_is_of_no_use_is_shown_as_new(pool, tmp_path):
    odd = {**TABLE, "claude": {**SONNET, "input_cost_per_parsec": 1.0}}
    pool.with_name("prices.json").write_text(json.dumps(odd))
    told = refreshed(pool, newer(pool, **{"deepseek/chat": {**DEEPSEEK, "input_cost_per_token": 5.6e-07}}))
    assert "price_in             - -> 3\n" in told and "price_in             0.28 -> 0.56  (+100.0 %)" in told


def test_another_name_of_a_model_is_kept_with_what_it_names(pool):
    pool.write_text(POOL.replace("litellm:claude", "litellm:latest"))
    refreshed(pool, newer(pool, latest={"alias_of": "claude"}), write=True)
    assert load_catalogue(pool)["dear"].price_in == 3.0


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, "no input_cost_per_token of 'claude'"),
        ({"input_cost_per_token": 3e-06}, "no output_cost_per_token"),
        ({**SONNET, "input_cost_per_token": "three"}, "input_cost_per_token: 'three', which is no price"),
        ({**SONNET, "output_cost_per_token": -1.5e-05}, "no price"),
        ({**SONNET, "input_cost_per_token": None}, "no input_cost_per_token"),
        ({**SONNET, "cache_read_input_token_cost": [3e-07]}, "no price"),
        ({**SONNET, "input_cost_per_token": 3.0}, r"'price_in' is 3000000.0 \(no model costs more than \$10000"),
        ({**SONNET, "output_cost_per_token": 1.5e-11}, r"'price_out' is .*looks like a price per token"),
        ({**SONNET, "cache_creation_input_token_cost_above_1hr": 6.0}, "'price_cache_write_1h' is 6000000.0"),
        ({**SONNET, "cache_creation_input_token_cost_above_12hr": 7e-06}, "they differ"),
        ({**SONNET, "input_cost_per_request": 500.0}, "'price_request' is 500.0"),
        ({**SONNET, "input_cost_per_token_above_200k_tokens": 9.0}, "'price_tiers'"),
        ({**SONNET, "prompt_cache_min_tokens": -5}, "prompt_cache_min_tokens"),
        ({**SONNET, "input_cost_per_parsec": 1.0}, "input_cost_per_parsec"),
        ({**SONNET, "mode": "embedding"}, "no text chat model"),
        ("free", "no model 'claude'"),
        (None, "no model 'claude'"),
    ],
)
def test_nonsense_is_named_and_changes_nothing(pool, capsys, entry, words):
    before = pool.with_name("prices.json").read_text()
    source = newer(pool, claude=entry)
    with pytest.raises(ValueError, match=words) as caught:
        refreshed(pool, source, write=True)
    assert "pool.yaml: member 'dear'" in str(caught.value)
    code, out, err = ran(capsys, "refresh", pool, "--source", source, "--write")
    assert code == 2 and not out and err.startswith("error: ") and len(err.splitlines()) == 1
    assert pool.with_name("prices.json").read_text() == before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.json", "cannot be read as litellm's price table"),
        ("ftp://host/table.json", "begins with https://"),
        ("http://prices.example/table.json", "begins with https://"),
        ("https://", "cannot be read"),
    ],
)
def test_a_source_that_cannot_be_had(pool, source, words):
    with pytest.raises(ValueError, match=words):
        refreshed(pool, source)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, json.dumps({**TABLE, "claude": NEWER}), None),
        (404, "gone", "the server answers 404"),
        (302, "", "the server answers 302"),
        (200, "<html>", "download https://"),
        (200, "[]", "one JSON object"),
        (200, '{"a": 1, "a": 2}', "written twice"),
        (200, b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_a_table_from_an_address(pool, status, body, words):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else body.encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/table.json"
        if words is None:
            assert "price_in             3 -> 2" in refreshed(pool, address)
        else:
            with pytest.raises(ValueError, match=words):
                refreshed(pool, address)
    finally:
        server.shutdown()
        server.server_close()


def test_a_catalogue_with_its_own_prices_has_nothing_to_refresh_and_is_shown(tmp_path, capsys):
    path = tmp_path / "pool.yaml"
    tiers = "[{above: 200000, price_in: 2, price_out: 4, price_cached: 0.2}]"
    path.write_text(
        "members:\n  - {name: a, descriptor: x, price_in: 1, price_out: 2.5, price_cached: 0.1, cache_seconds: 300,"
        f" price_tiers: {tiers}}}\n  - {{name: free, descriptor: x, price_in: 0, price_out: 0}}\n"
    )
    code, _, err = ran(capsys, "refresh", path)
    assert code == 2 and "no member says price_from" in err
    code, out, _ = ran(capsys, "show", path)
    assert code == 0 and [line.split() for line in out.splitlines()] == [
        ["USD", "per", "million", "tokens", "in", "out", "cached", "tiers", "above", "cache", "s"],
        ["a", "1", "2.5", "0.1", "200000:", "in", "2", "out", "4", "cached", "0.2", "300"],
        ["free", "0", "0"],
    ]
    assert ran(capsys, "show", tmp_path / "no.yaml")[0] == 2
