"""`srpo frontier` on a small table, end to end; and members that a router sees for the first time, by hand."""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from routers.evaluation.episodes import Episodes, Outcomes, RewardRule
from routers.evaluation.statistics import LEFT_OUT, Paired
from routers.evaluation.tables import render
from routers.router import Decision
from routers.tasks.query_routing.frontier import left_out, main

CATALOGUE = """members:
- {name: small, descriptor: sums, price_in: 0.1, price_out: 0.1}
- {name: middle, descriptor: rivers, price_in: 0.3, price_out: 0.3}
- {name: large, descriptor: all, price_in: 1.0, price_out: 1.0}
"""
TWO = ["--baselines", "TF-IDF ridge", "oracle"]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sums are small's, rivers are middle's; large knows three of four of each. Nobody reads MiniLM's embeddings."""
    monkeypatch.setattr("routers.tasks.query_routing.encoder.training.has_minilm", lambda: False)
    rows = []
    for i in range(64):
        sums = i % 2 == 0
        right = {"small": sums, "middle": not sums, "large": i % 8 > 1}
        query = f"add {i} and {i + 3} to a sum" if sums else f"which river number {i} is longest in land {i}"
        for member, correct in right.items():
            row = {"query_id": f"q{i:02}", "query": query, "member": member, "correct": correct, "prompt_tokens": 20}
            rows.append({**row, "completion_tokens": 10, "split": "heldout" if i >= 48 else "train"})
    (tmp_path / "catalogue.yaml").write_text(CATALOGUE)
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "set.jsonl"


def run_folder(folder: Path, episodes: Episodes, routes: str) -> Path:
    """What `srpo train` leaves: a policy that asks one member, and a baseline of another version."""
    asked = episodes.of(router=routes).frame
    parts = [asked.assign(router="srpo", kind="policy"), asked.assign(router="old kNN", kind="learned")]
    header = {"rule": {"baselines": {"cost_weight": 9.0}}, "train_reward": {"old kNN": 0.1}}
    Episodes.merged([Episodes(part.assign(reward=-7.0), header) for part in parts]).write(
        folder / "evaluation.parquet"
    )
    return folder


def test_everything_of_one_table(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--table", str(table), "--seeds", "1", "--cost_weights", "0", "0.5", *TWO, "--members_left_out"]
    text = main([*words, "--output", str(tmp_path / "a")])
    shown = capsys.readouterr()
    assert text in shown.out and "16 held-out queries, 3 members" in shown.err and "without large" in shown.err
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {
        "evaluation.parquet", "table.md", "report.html", "frontier.png"
    }  # fmt: skip
    assert (tmp_path / "a" / "table.md").read_text() == text and text.startswith("```bash\nsrpo frontier --table ")
    assert "1 cannot route to a member that they were not fitted on: TF-IDF ridge" in text
    assert "256 directions of n-grams: read by encoder expected (seeds: 1)" in text
    found = Episodes.read(tmp_path / "a")
    swept = {name for name in found.routers if ", price sensitivity 0.5" in name}
    assert swept == {f"{name}, price sensitivity 0.5" for name in ("TF-IDF ridge", "encoder expected")}
    paired = Paired(found)
    assert all(paired.mean("oracle", "score") >= paired.mean(name, "score") for name in paired.routers)
    # the texts say it all: a sum or a river; and a member that was left out is found by what it does on few queries
    assert paired.mean("TF-IDF ridge", "score") == paired.mean("encoder expected", "score") == 1.0
    assert paired.mean(LEFT_OUT.format("encoder expected"), "score") > 0.75 > paired.mean("large", "score") - 0.01

    # Policies of other runs stand in the same table, with this table's reward, seeds together.
    runs = [run_folder(tmp_path / f"ours-seed{i}", found, routes) for i, routes in enumerate(("small", "large"))]
    again = ["--table", str(table), "--objectives", *TWO, "--cost_weights", "0", "0.5", "--runs", *map(str, runs)]
    main([*again, "--output", str(tmp_path / "b")])
    second = Episodes.read(tmp_path / "b")
    assert "old kNN" not in second.routers and second.header["rule"] == found.header["rule"]
    both = Paired(second)
    assert both.policies == ["ours"] and both.values("ours", "reward").shape == (2, 16)
    assert both.mean("ours", "reward") == pytest.approx(
        (both.mean("small", "reward") + both.mean("large", "reward")) / 2
    )
    same = ["router", "item", "score", "usd", "reward", "expected"]  # times differ from run to run
    ridge = [one.of(router="TF-IDF ridge").frame[same] for one in (found, second)]
    assert ridge[0].equals(ridge[1])
    short = Episodes.read(runs[0])
    Episodes(short.frame[short.frame["item"] != "q50"], short.header).write(runs[0] / "evaluation.parquet")
    with pytest.raises(ValueError, match="ours-seed0 was not evaluated on 1 of these 16 held-out queries"):
        main([*again, "--output", str(tmp_path / "b")])


def test_mistakes_are_named(table: Path, tmp_path: Path) -> None:
    options = ["--table", str(table), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--baselines: there is no 'kNN'; there are random, "):
        main([*options, "--baselines", "kNN"])
    with pytest.raises(ValueError, match="--objectives: there is no 'gpro'; there are expected, grpo, "):
        main([*options, "--objectives", "gpro"])
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if '"q50"' not in line or '"large"' not in line))
    with pytest.raises(ValueError, match=r"1 of 64 queries lack .* 'q50', which has no reply of \['large'\]"):
        main(options)
    table.write_text("\n".join(line for line in lines if '"small"' in line))
    with pytest.raises(ValueError, match=r"--members_left_out: .*set\.jsonl has one member"):
        main([*options, "--members_left_out"])
    table.write_text("\n".join(line for line in lines if '"train"' not in line or '"q00"' in line))
    with pytest.raises(ValueError, match="has 1 training queries, and the encoder needs 10: give --objectives alone"):
        main(options)


class BestOnProbes:
    """Everything goes to the member with the highest mean score on the probes."""

    def __init__(self, part: Outcomes) -> None:
        self.part = part

    def introduce(self, probes: Outcomes) -> Self:
        assert self.part.score.shape[1] == probes.score.shape[1] - 1 == 2
        return self._to_the_best_of(probes)

    def _to_the_best_of(self, known: Outcomes) -> Self:
        self.best = known.members[int(known.score.mean(axis=0).argmax())]
        return self

    def route_all(self, queries: list[str]) -> list[Decision]:
        return [Decision((self.best,), {}) for _ in queries]


class Deaf(BestOnProbes):
    """Learns nothing of the new member."""

    def introduce(self, probes: Outcomes) -> Self:
        return self._to_the_best_of(self.part)


def test_members_left_out_by_hand() -> None:
    items: list[Any] = [{"query_id": str(i), "query": f"q {i}"} for i in range(4)]
    score = np.array([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]])  # means .75 .5 .5
    usd = np.zeros((4, 3))
    known = Outcomes(items, ["a", "b", "c"], score, usd, score, rule=RewardRule(1.0))
    told = [left_out(known, known, "x", "learned", [fit], print) for fit in (BestOnProbes, Deaf)]
    # all to a, whoever is new; without a the deaf one takes b (of equals the first): (.75 + .75 + .5) / 3
    assert [one.frame["reward"].mean() for one in told] == pytest.approx([0.75, 2 / 3])
    oracle = known.play("oracle", "oracle", ["a", "a", "b", "a"])
    members = [known.play(member, "member", [member] * 4) for member in known.members]
    full = known.play("x", "learned", ["a", "a", "c", "a"])
    found = Paired(Episodes.merged([*members, oracle, full, told[1]]))
    # gain of the oracle .25 above a; x has all of it, and loses 1/12 below a where it is deaf: -1/3 of it
    assert found.gained("x").value == pytest.approx(1.0)
    new = LEFT_OUT.format("x")
    assert found.gained(new).value == pytest.approx(-1 / 3) and found.gained(new, of="x").value == pytest.approx(
        -1 / 3
    )
    assert np.isnan(found.gained(new, of="a").value)  # nothing was gained, so no share of it is kept
    assert "Members left out" in render(Episodes.merged([*members, oracle, full, told[1]]))
