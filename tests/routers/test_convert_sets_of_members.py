"""`srpo convert sets`: a member for every set of members, by hand and through a fitted router and a trained one."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from routers.data.converters import EVALUATION_ONLY
from routers.data.converters.command import main
from routers.data.converters.sets import convert_sets, f_beta, plurality
from routers.data.table import load_table
from routers.evaluation.episodes import Episodes
from routers.evaluation.statistics import Paired
from routers.router import load_router
from routers.serving.making import other_pool
from routers.tasks.query_routing.frontier import main as frontier
from srpo.train import main as train

PRICES = """members:
- {name: a, descriptor: first, price_in: 1, price_out: 2}
- {name: b, descriptor: second, price_in: 10, price_out: 20}
- {name: c, descriptor: third, price_in: 0, price_out: 0}
"""
SAID = {  # query: what a, b and c replied, where the answer is 4
    "all": ("4", "4.", "It is 4."),
    "two of three": ("5", "1 + 3 = 4", "4"),
    "two that err": ("5", "4", "5"),
    "nobody agrees": ("5", "4", "6"),
    "silent": ("", "4", ""),  # two empty replies are no agreement
}


def rows(said: Mapping[str, tuple[str, ...]] = SAID, **more: object) -> list[dict]:
    return [
        {"query_id": f"id of {text}", "query": text, "member": name, "reply": reply, "gold": ["4"], "family": "sums",
         "correct": float("4" in reply), "prompt_tokens": 10, "completion_tokens": 1 + j, "split": "train", **more}
        for text, replies in said.items() for j, (name, reply) in enumerate(zip("abc", replies, strict=True))
    ]  # fmt: skip


def put(folder: Path, lines: list[dict], prices: str = PRICES) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "catalogue.yaml").write_text(prices)
    return str(folder / "table.jsonl")


def test_f_beta_by_hand() -> None:
    correct = np.array([[1.0, 0.0, 0.0], [0.9, 0.5, 0.49], [0.0, 0.2, 0.0]])  # right: a; a and b; nobody
    assert f_beta(correct, (0, 1), 1.0) == pytest.approx([2 / 3, 1.0, 0.0])  # P 1/2, R 1: 2 * .5 / 1.5
    assert f_beta(correct, (0, 1), 2.0) == pytest.approx([5 / 6, 1.0, 0.0])  # 5 * .5 / (4 * .5 + 1)
    assert f_beta(correct, (0,), 2.0) == pytest.approx([1.0, 5 / 9, 0.0])  # P 1, R 1/2: 5 * .5 / (4 + .5)
    assert f_beta(correct, (1, 2), 1.0) == pytest.approx([0.0, 0.5, 0.0])  # P 1/2, R 1/2


def test_plurality_by_hand() -> None:
    answers = np.array([[0, 1, 0], [0, 1, 1], [0, 1, 2], [0, 0, 1]])
    trusted = np.array([0.1, 0.5, 0.5])
    assert plurality(answers, (0, 1, 2), trusted).tolist() == [
        2,
        1,
        1,
        1,
    ]  # between b and c b, the first
    assert plurality(answers, (0, 2), trusted).tolist() == [2, 2, 2, 2]  # two that disagree: the better one
    assert plurality(answers, (0,), trusted).tolist() == [0] * 4


def test_a_table_of_sets(tmp_path: Path) -> None:
    source = put(tmp_path / "from", rows())
    table = convert_sets(source, largest=3, merger="plurality").table()
    assert table.members == ["a", "b", "c", "a+b", "a+c", "b+c", "a+b+c"]
    assert [query["query_id"] for query in table.queries("train")] == [f"id of {text}" for text in SAID]
    assert table.queries()[0]["family"] == "sums" and table.gold("id of all") == ("4",)
    assert table.catalogue["a+c"].descriptor == "first + third" and not table.catalogue["a"].priced
    one = table.lookup("id of two of three", "a+b+c")
    assert (one.reply, one.correct, one.prompt_tokens, one.completion_tokens) == ("1 + 3 = 4", 1.0, 30, 6)
    assert one.cost == pytest.approx(sum((12e-6, 140e-6, 0)))
    last = table.members.index("a+b+c")
    # b, always right, is the most trusted, and is outvoted once
    assert table.correct_matrix()[:, last].tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    two = table.members.index("a+b")
    assert table.correct_matrix()[:, two].tolist() == table.correct_matrix()[:, 1].tolist()
    scored = convert_sets(source, largest=2, beta=2.0).table()
    assert not scored.has_replies and scored.lookup("id of two of three", "a+b").correct == pytest.approx(0.5)
    assert np.allclose(scored.cost_matrix()[:, 3], scored.cost_matrix()[:, :2].sum(axis=1))


def test_a_query_without_some_outcome_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = put(tmp_path / "from", rows()[:-1])
    main(["sets", source, "--output", str(tmp_path / "to" / "table.parquet")])
    assert "kept 4 queries (4 train, 0 held out) x 6 members; left out: 1 incomplete query" in capsys.readouterr().out
    assert "id of silent" in (tmp_path / "to" / "table.quarantine.txt").read_text()
    assert len(load_table(tmp_path / "to" / "table.parquet")) == 4


def test_what_is_refused(tmp_path: Path) -> None:
    source = put(tmp_path / "from", rows())
    for how, words in (
        ({"largest": 0}, "largest is 0; a set has from 1 to 3"),
        ({"largest": 4}, "largest is 4"),
        ({"beta": 0.0}, "beta is 0.0; it must be a finite number above 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"merger": "vote"}, "there is no merger 'vote'; there are plurality, f_beta"),
    ):
        with pytest.raises(ValueError, match=words):
            convert_sets(source, **how)
    silent = [{name: value for name, value in row.items() if name != "reply"} for row in rows()]
    with pytest.raises(ValueError, match="has no replies, which plurality compares"):
        convert_sets(put(tmp_path / "silent", silent), merger="plurality")
    with pytest.raises(ValueError, match="is a log of decisions"):
        convert_sets(put(tmp_path / "log", rows(propensity=0.5)[::3]))
    joined = [{**row, "member": "x+y"} if row["member"] == "a" else row for row in rows()]
    with pytest.raises(ValueError, match=r"member 'x\+y' has a \+ in its name"):
        convert_sets(put(tmp_path / "joined", joined, PRICES.replace("name: a", "name: x+y")))
    many = [{**rows()[0], "member": f"m{j}"} for j in range(20)]
    listed = "".join(f"- {{name: m{j}, descriptor: d, price_in: 1, price_out: 1}}\n" for j in range(20))
    with pytest.raises(ValueError, match="210 sets of 20 members are more than 200; give a smaller --largest"):
        convert_sets(put(tmp_path / "many", many, f"members:\n{listed}"))
    alone = str(tmp_path / "alone.parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"query": ["q"]}).replace_schema_metadata({EVALUATION_ONLY: "kept_back"}), alone)
    with pytest.raises(ValueError, match="kept_back is for evaluation only"):
        convert_sets(alone)
    output = ["--output", str(tmp_path / "t.parquet")]
    for argv, words in (
        (["wide", source, "--largest", "2"], "--largest: is of `srpo convert sets`, and wide has none"),
        (["sets", source, "--members", "a"], "--members: sets are made of all members"),
        (["sets", source, "--merger", "plurality", "--beta", "2"], "--beta: is of --merger f_beta"),
    ):
        with pytest.raises(ValueError, match=words):
            main([*argv, *output])


def test_a_pair_by_plurality_is_its_better_member(tmp_path: Path) -> None:
    main(["sets", "quickstart", "--merger", "plurality", "--output", str(tmp_path / "table.parquet")])
    table = load_table(tmp_path / "table.parquet")
    correct, cost = table.correct_matrix("train"), table.cost_matrix("train")
    for j, name in enumerate(table.members):
        parts = [table.members.index(part) for part in name.split("+")]
        assert np.array_equal(correct[:, j], correct[:, max(parts, key=lambda k: correct[:, k].mean())])
        assert np.allclose(cost[:, j], cost[:, parts].sum(axis=1))


def test_sets_are_played_trained_on_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routers.tasks.query_routing.encoder.training.has_minilm", lambda: False)
    said = {f"{what} {i}": ("4", "4", "5") if what == "sum" else ("5", "5", "4") for what in ("sum", "name")
            for i in range(24)}  # fmt: skip
    lines = [{**row, "split": "heldout" if int(row["query"].split()[1]) % 3 == 0 else "train"} for row in rows(said)]
    made = tmp_path / "sets" / "table.parquet"
    main(["sets", put(tmp_path / "from", lines), "--output", str(made)])
    frontier(["--table", str(made), "--baselines", "TF-IDF ridge", "oracle", "--objectives",
              "--cost_weights", "0.02", "--output", str(tmp_path / "frontier")])  # fmt: skip
    found = Paired(Episodes.read(tmp_path / "frontier"))
    # a and b are right together, and F of either alone is 2/3: nobody but a set earns all
    assert found.mean("oracle", "score") == found.mean("TF-IDF ridge", "score") == 1.0
    assert found.mean("a+b", "score") == pytest.approx(0.5) == found.mean("c", "score")
    run = tmp_path / "run"
    train(
        ["quickstart/sets", "--table", str(made), "--output_dir", str(run), "--max_steps", "5", "--cost_weights", "0"]
    )
    with load_router(run) as router:
        decision = router.route("sum 3")
        assert decision.members == (decision.member,) and "a+b" in decision.scores and len(decision.scores) == 6
    now = load_router(run, catalogue=tmp_path / "from" / "catalogue.yaml").members  # of endpoints: none is called a+b
    assert other_pool(list(decision.scores), now) == ["routes among a, b, c; without a+b, a+c, b+c of its training"]
