"""A checkpoint of a step router from the command line: evaluated beside all baselines, compared, and watched."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import step_helpers as steps
import yaml

ROOT = Path(__file__).resolve().parents[2]

from routers import StepRouter
from routers.environments.registry import benchmark
from routers.tasks.step_routing import evaluate as evaluate_bopo
from routers.tasks.step_routing import play as play_bopo
from srpo.recipe import RecipeError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts/train_bopo.py leaves: a model, its tokenizer, how it was told of episodes, and the recipe."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-seed0"
    model, tokenizer = steps.policy()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    steps.settings("compact").save(folder)
    recipe = {"environment": "alfworld", "heldout_tasks": ["generated/test"], "heldout_count": 4, "step_limit": 12}
    recipe |= {"observation": "compact", "eval_caps": [math.inf, 1.0], "executor_usd": [0.0001, 0.0024]}
    recipe |= {"profile_runs": 2, "learning_rate": 1e-3, "cost_weight": 0.3, "task_dir": "not/on/this/machine"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    evaluate_bopo.main([str(word) for word in words])
    return capsys.readouterr().out


def test_a_checkpoint_is_evaluated_sampled_and_greedy_beside_all_baselines(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And every episode of the table is what `StepRouter.play` makes of it: two ways to play, one result."""
    out = tmp_path / "tiny-seed0"
    text = run(
        capsys, "--model", checkpoint, "--temperature", 1, 0, "--seeds", 0, 1, "--output", out, "--eval_caps", "inf", 2
    )
    for words in ("| policy ", "| policy, greedy ", "| always-small ", "| always-large ", "first-large", "cascade"):
        assert words in text, words
    assert (out / "tables.md").read_text() in text and (out / "frontier.png").stat().st_size > 0
    assert len(list((out / "task").glob("rules_*.parquet"))) == 1 and not Path("not/on/this/machine").exists()

    frame = pd.read_parquet(out / "episodes.parquet")
    for name, temperature in (("policy", 1.0), ("policy, greedy", 0.0)):
        with StepRouter.from_pretrained(checkpoint, temperature=temperature) as router:
            rows = frame[frame["method"] == name]
            assert len(rows) == 2 * 2 * 4 and set(rows["cap"]) == {math.inf, 2.0}  # seeds x caps x tasks
            for row in rows.itertuples():
                world = benchmark("alfworld").make(row.task, 12)
                cap = None if math.isinf(row.cap) else row.cap
                seed = f"evaluation/{row.repetition}/{row.task}"
                played = router.play(world, steps.executors(), cap, seed=seed)
                large = sum(step.executor == "planner" for step in played.steps)
                assert (row.success, row.steps, row.large_calls) == (played.score, len(played.steps), large)
                assert row.executor_usd == pytest.approx(played.executor_usd)
                assert row.policy_usd == pytest.approx(played.policy_usd) and row.policy_usd > 0
                assert not row.violated and (cap is None or large <= cap)

    compared = run(capsys, out, "--markdown", "--picture", tmp_path / "picture.png")
    assert "| tiny " in compared and "| tiny, greedy " in compared and "| policy " not in compared
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_lines_of_the_recipe_can_be_changed_and_baselines_are_played_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--model", checkpoint, "--task_dir", tmp_path / "task")
    run(capsys, *where, "--output", tmp_path / "a", "--heldout_count", 3)
    [rules] = (tmp_path / "task").glob("rules_*.parquet")
    before = rules.stat().st_mtime_ns
    run(capsys, *where, "--output", tmp_path / "b", "--heldout_count", 2)  # fewer: those that are there are enough
    assert rules.stat().st_mtime_ns == before
    frames = [pd.read_parquet(tmp_path / name / "episodes.parquet") for name in "ab"]
    assert [frame["task"].nunique() for frame in frames] == [3, 2]
    small = [f[f["method"] == "random mixing 0"].set_index(["task", "repetition"])["success"] for f in frames]
    assert small[0].loc[small[1].index].equals(small[1])
    run(capsys, *where, "--output", tmp_path / "c", "--heldout_count", 4)  # more: they are played again
    assert pd.read_parquet(rules)["task"].nunique() == 4
    with pytest.raises(RecipeError, match="unknown option '--heldout_cuont'"):
        run(capsys, *where, "--heldout_cuont", 3)
    with pytest.raises(ValueError, match="step_limit=12, the recipe says 9"):
        run(capsys, *where, "--output", tmp_path / "d", "--step_limit", 9)


def test_a_checkpoint_without_a_recipe_says_what_to_do(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no recipe\.yaml.*--config"):
        evaluate_bopo.main(["--model", str(tmp_path)])


def test_a_router_can_be_watched(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(checkpoint), "--count", "2", "--cap", "1", "--seed", "x"]
    assert play_bopo.main(words) == 0
    told = capsys.readouterr().out
    assert play_bopo.main([*words, "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [first["task"], second["task"]] == ["generated/test/0", "generated/test/1"]
    for episode in (first, second):
        assert sum(step["executor"] == "planner" for step in episode["steps"]) <= 1
        assert episode["cost_usd"] == pytest.approx(episode["executor_usd"] + episode["policy_usd"])
        for step in episode["steps"]:
            left = f"budget left {step['left']:g}"
            assert f"{step['executor']} ({step['probability']:.2f} of {', '.join(step['allowed'])}, {left})" in told
        assert f"score {episode['score']:g}, ${episode['executor_usd']:.6f} for executors" in told
    assert play_bopo.main(["--model", str(checkpoint), "--count", "1", "--json"]) == 0  # no cap: null, not Infinity
    assert {step["left"] for step in json.loads(capsys.readouterr().out)["steps"]} == {None}
