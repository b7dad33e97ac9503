"""Loading and converting ALFWorld's game files; replays of the walkthroughs that come with the real games."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
from alfworld_problem import COOK, TASK, data, game, problem

from routers.environments.alfworld.environment import AlfWorld
from routers.environments.alfworld.games import convert, load_game, load_games
from routers.environments.protocol import NOTHING_HAPPENS, GameError

GRAMMAR = 'grammar :: """ {"task": [{"rhs": "Your task is to: put some apple on microwave."}]} """;'
WALKTHROUGH = ["go to cabinet 1"]


def game_file(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    content = {"pddl_domain": "", "grammar": GRAMMAR, "pddl_problem": problem(), "solvable": True} | changes
    path = folder / "game.tw-pddl"
    path.write_text(json.dumps(content | {"walkthrough": WALKTHROUGH}))
    return path


def test_a_game_file_is_the_problem_and_the_line_of_its_grammar(tmp_path: Path) -> None:
    loaded = load_game(game_file(tmp_path / "a" / "trial_1"))
    assert (loaded.task, loaded.task_type) == ("put some apple on microwave.", "pick_and_place_simple")
    assert loaded.walkthrough == ("go to cabinet 1",) and loaded.facts == game().facts


@pytest.mark.parametrize("name", ["games.jsonl", "games.jsonl.xz"])
def test_a_converted_folder_is_what_was_in_it(tmp_path: Path, name: str) -> None:
    for trial in ("b/trial_2", "a/trial_1"):
        game_file(tmp_path / "in" / trial)
    game_file(tmp_path / "in" / "c" / "trial_3", solvable=False)
    assert convert(tmp_path / "in", tmp_path / name) == 2
    packed, direct = load_games(tmp_path / name), load_games(tmp_path / "in")
    assert [g.id for g in packed] == ["a/trial_1", "b/trial_2"]  # sorted, the unsolvable one left out
    assert packed == direct
    assert len(load_games(tmp_path / name, count=1)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pddl_problem": None}, "field 'pddl_problem' must be a str"),
        ({"grammar": 3}, "field 'grammar' must be a str"),
        ({"grammar": "no task"}, "field 'grammar' has no line 'Your task is to"),
        ({"pddl_problem": "(define)"}, "pddl_problem has no"),
        ({"pddl_problem": problem(COOK.replace("inRec", "nearRec"))}, "the goal is none of ALFWorld's six"),
        ({"pddl_problem": problem(extra="(flies agent1)")}, "unknown to ALFWorld.s domain: \\(flies agent1\\)"),
        ({"pddl_problem": problem(extra="(openable)")}, "unknown to ALFWorld.s domain: \\(openable\\)"),
        ({"pddl_problem": problem(extra="(holds agent1 Pen_bar_9)")}, "pen_bar_9 is in a fact, but has no objectType"),
        ({"pddl_problem": problem(extra="(atLocation agent1 loc_bar_3)")}, "2 facts atLocation"),
        ({"pddl_problem": problem(extra="(receptacleType Safe_bar_1 SafeType)")}, "receptacle safe_bar_1 needs both"),
    ],
)
def test_errors_name_the_file_and_what_is_wrong(tmp_path: Path, changes: dict, message: str) -> None:
    path = game_file(tmp_path / "in" / "broken", **changes)
    for action in (lambda: load_game(path), lambda: convert(tmp_path / "in", tmp_path / "out.jsonl")):
        with pytest.raises(GameError, match=message) as error:
            action()
        assert str(path) in str(error.value)


def test_errors_of_packed_files_name_the_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"id": "x", "task": f"Your task is to: {TASK}", "walkthrough": [], "problem": problem()}
    path = tmp_path / "games.jsonl"
    wrong_task = json.dumps({**row, "task": 1})
    for bad, message in (
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        (wrong_task, "field 'task' must be a str"),
    ):
        path.write_text(f"{json.dumps(row)}\n{bad}\n")
        with pytest.raises(GameError, match=message) as error:
            load_games(path)
        assert "games.jsonl: row 2: " in str(error.value) and str(path) in str(error.value)
    path.write_text(f"{json.dumps(row)}\n" * 19 + "{\n")
    with pytest.raises(GameError, match=r"packed\.jsonl: no such file"):
        load_games(tmp_path / "packed.jsonl")
    assert len(load_games(path)) == 19  # one of twenty is bad
    assert "1 of 20 games of" in caplog.text and "row 20: is not JSON" in caplog.text
    for target, message in ((tmp_path / "games.csv", "expected a folder, .jsonl or"), (tmp_path, "no games")):
        with pytest.raises(GameError, match=message):
            load_games(target)
    with pytest.raises(GameError, match="not a folder"):
        convert(tmp_path / "nowhere", path)


def replay(path: Path, count: int | None = None) -> int:
    games = load_games(path, count)
    for loaded in games:
        environment = AlfWorld(loaded, limit=len(loaded.walkthrough))
        environment.reset()
        for command in loaded.walkthrough:
            assert environment.step(command)[0] != NOTHING_HAPPENS, f"{loaded.id}: {command}"
        assert environment.won, loaded.id
    return len(games)


def test_the_walkthroughs_of_150_real_games_lead_to_success() -> None:
    assert replay(data("valid_unseen.jsonl.xz")) == 134
    assert replay(data("train_600.jsonl.xz"), 16) == 16


@pytest.mark.slow
def test_the_walkthroughs_of_all_real_training_games_lead_to_success() -> None:
    assert replay(data("train_full.jsonl.xz")) == 3553


def test_real_games_through_the_converter(tmp_path: Path) -> None:
    source = data("valid_unseen.jsonl.xz")
    grammar = source.with_name("grammar_base.twl2").read_text()
    with lzma.open(source, "rt") as lines:
        rows = [json.loads(next(lines)) for _ in range(3)]
    for row in rows:
        folder = tmp_path / "in" / row["id"]
        folder.mkdir(parents=True)
        content = {"pddl_domain": "", "grammar": grammar.replace("@@TASK@@", row["task"]), "solvable": True}
        content |= {"pddl_problem": row["problem"], "walkthrough": row["walkthrough"]}
        (folder / "game.tw-pddl").write_text(json.dumps(content))
    assert convert(tmp_path / "in", tmp_path / "out.jsonl.xz") == 3
    assert {g.id: g for g in load_games(tmp_path / "out.jsonl.xz")} == {g.id: g for g in load_games(source, 3)}


def test_the_converter_as_a_command(tmp_path: Path) -> None:
    game_file(tmp_path / "in" / "trial")
    words = ["routers.environments.alfworld.games", str(tmp_path / "in"), str(tmp_path / "out.jsonl")]
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stdout == f"1 games in {tmp_path / 'out.jsonl'}\n", done.stderr
    assert len(load_games(tmp_path / "out.jsonl")) == 1
