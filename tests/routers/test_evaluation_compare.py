"""Runs side by side: seeds of one recipe in one row, starts and baselines once, and only what can be compared."""

from pathlib import Path

import pytest
from test_evaluation import episodes
from test_evaluation_episodes import KNOWN, MEMBERS

from routers.evaluation.compare import compared, main
from routers.evaluation.episodes import Episodes
from routers.evaluation.statistics import Paired

RULE = {"rule": {"baselines": {"cost_weight": 0.2}}}


def run(folder: Path, routes: list[str | None], start: list[str | None], name: str = "srpo") -> Path:
    parts = [
        KNOWN.play(name, "policy", routes, header=RULE),
        KNOWN.play("start", "start", start),
        *(KNOWN.play(member, "member", [member] * 4) for member in MEMBERS),
    ]
    Episodes.merged(parts).write(folder / "evaluation.parquet")
    return folder


def test_seeds_in_one_row_and_what_is_shared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun: list[str | None] = ["dear"] * 4
    runs = [
        run(tmp_path / "a-seed0", ["cheap"] * 4, begun),
        run(tmp_path / "a-seed1", ["cheap", "cheap", "dear", "cheap"], begun),
        run(tmp_path / "b-seed0", ["dear"] * 4, begun, "grpo"),
    ]
    text = main([str(folder) for folder in [*runs, "--output", tmp_path / "out"]])
    assert text in capsys.readouterr().out
    lines = {line[:16].strip(): line for line in text.split("Gains")[0].splitlines()}
    # rewards: cheap everywhere (0.96 + 0.96 - 0.08 - 0.04)/4; with dear on the third (0.96 + 0.96 + 0.8 - 0.04)/4
    assert lines["a"].endswith("0.450 0.670") and "62.5%" in lines["a"] and "  0.560  " in lines["a"]
    assert "  0.330  " in lines["b"] and "  0.330  " in lines["start"]  # (0.84 - 0.16 + 0.8 - 0.16)/4
    assert any(line.startswith("a minus the start (start)") and "+0.230" in line for line in text.splitlines())
    assert any(line.startswith("b minus the first policy (a)") and "-0.230" in line for line in text.splitlines())
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "report.html",
        "frontier.png",
        "evaluation.parquet",
    }
    merged = Episodes.read(tmp_path / "out")
    assert merged.routers == {"a": "policy", "b": "policy", "start": "start", "cheap": "member", "dear": "member"}
    assert merged.of(router="start").frame["seed"].nunique() == 2


def test_recipes_that_began_elsewhere_keep_their_starts(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / "a", ["cheap"] * 4, ["dear"] * 4),
        run(tmp_path / "b", ["dear"] * 4, ["cheap"] * 4, "grpo"),
    ]
    paired = Paired(compared({folder: Episodes.read(folder) for folder in runs}))
    assert paired.of_kind("start") == ["a: start", "b: start"]
    found = [paired.start_of(name) for name in "ab"]
    assert [start and start.router for start in found] == ["a: start", "b: start"]
    assert paired.difference("a", "a: start", "reward").value == pytest.approx(0.45 - 0.33)


def test_settings_of_a_policy_are_called_after_its_run(tmp_path: Path) -> None:
    frame = episodes({"srpo": [1, 0], "srpo, price sensitivity 0.8": [0, 0]}).frame
    frame.loc[frame["router"] != "srpo", "curve"] = "srpo"
    Episodes(frame).write(tmp_path / "mine-seed3" / "evaluation.parquet")
    found = compared({tmp_path / "mine-seed3": Episodes.read(tmp_path / "mine-seed3")})
    assert list(found.routers) == ["mine", "mine, price sensitivity 0.8"] and set(found.frame["seed"]) == {3}
    paired = Paired(found)
    assert paired.policies == ["mine"] and paired.curves["mine, price sensitivity 0.8"] == "mine"


def test_only_runs_on_the_same_items_and_rewards_are_compared(tmp_path: Path) -> None:
    first = run(tmp_path / "a", ["cheap"] * 4, ["dear"] * 4)
    other = Episodes.read(first)
    Episodes(other.frame, {"rule": {"baselines": {"cost_weight": 0.4}}}).write(tmp_path / "b" / "evaluation.parquet")
    with pytest.raises(ValueError, match=r"rule\.baselines\.cost_weight is 0.2 in one part, 0.4 in another"):
        main([str(first), str(tmp_path / "b")])
    Episodes(other.frame[other.frame["item"] != "q3"], RULE).write(tmp_path / "c" / "evaluation.parquet")
    with pytest.raises(ValueError, match="was not played on all 4 items"):
        main([str(first), str(tmp_path / "c")])
    with pytest.raises(ValueError, match="have one name: call seeds of one recipe NAME-seed0"):
        main([str(first), str(run(tmp_path / "x" / "a", ["cheap"] * 4, ["dear"] * 4))])
    with pytest.raises(FileNotFoundError, match="no such file; srpo train"):
        main([str(tmp_path)])
