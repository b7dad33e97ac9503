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
from routers.tasks.step_routing import play
from srpo import evaluate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: a model, its tokenizer, how it was told of episodes, and the recipe."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-seed0"
    model, tokenizer = steps.policy()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    steps.settings("compact").save(folder)
    recipe = {"task": "step_routing", "objective": "bopo", "output_dir": str(folder), "use_cpu": True, "bf16": False}
    recipe |= {"environment": "alfworld", "heldout_tasks": ["generated/test"], "heldout_limit": 4, "step_limit": 12}
    recipe |= {"observation": "compact", "heldout_caps": [math.inf, 1.0], "executor_usd": [0.0001, 0.0024]}
    recipe |= {"profile_runs": 2, "learning_rate": 1e-3, "cost_weight": 0.3, "train_tasks": "not/on/this/machine"}
    recipe |= {"max_observation_tokens": 80, "policy_price_in": 1.0, "policy_price_out": 2.0, "report_to": "none"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(checkpoint: Path, output: Path, **changes: Any) -> pd.DataFrame:
    words = [word for key, value in changes.items() for word in (f"--{key}", *str(value).split())]
    return evaluate.main([str(checkpoint), "--output_dir", str(output), *words]).frame


def test_every_episode_of_the_table_is_what_the_router_plays(checkpoint: Path, tmp_path: Path) -> None:
    """Sampled and greedy, beside all rules: two ways to play, one result."""
    for temperature in (1.0, 0.0):
        out = tmp_path / f"at-{temperature:g}"
        frame = run(checkpoint, out, heldout_temperature=temperature, heldout_caps="inf 2", seed=1)
        assert {"always-small", "always-large", "first-large 2", "cascade 4"} <= set(frame["router"])
        assert not Path("not/on/this/machine").exists() and (out / "report.md").stat().st_size > 0
        with StepRouter.from_pretrained(checkpoint, temperature=temperature) as router:
            rows = frame[frame["kind"] == "policy"]
            assert len(rows) == 2 * 4 and set(rows["cap"]) == {math.inf, 2.0}  # caps x tasks
            for row in rows.itertuples():
                world = benchmark("alfworld").make(row.item, 12)
                cap = None if math.isinf(row.cap) else row.cap
                played = router.play(world, steps.executors(), cap, seed=f"evaluation/1/{row.item}")
                names = [step.executor for step in played.steps]
                assert (row.score, row.calls, row.member, row.stop) == (
                    played.score, len(names), " > ".join(names), played.stop,
                )  # fmt: skip
                assert row.usd == pytest.approx(played.cost_usd) and row.large_calls == names.count("planner")
                assert row.policy_usd == pytest.approx(played.policy_usd) and row.policy_usd > 0
                assert not row.violated and (cap is None or row.large_calls <= cap)


def test_rules_are_played_once_and_kept(checkpoint: Path, tmp_path: Path) -> None:
    shared = {"task_dir": tmp_path / "task"}
    first = run(checkpoint, tmp_path / "a", heldout_limit=3, **shared)
    [rules] = (tmp_path / "task").glob("rules_*.jsonl")
    before = rules.read_text()
    second = run(checkpoint, tmp_path / "b", heldout_limit=2, **shared)  # fewer: those that are there are enough
    assert rules.read_text() == before
    assert [frame["item"].nunique() for frame in (first, second)] == [3, 2]
    small = [f[f["router"] == "always-small"].set_index(["item", "seed"])["score"] for f in (first, second)]
    assert small[0].loc[small[1].index].equals(small[1])
    run(checkpoint, tmp_path / "c", heldout_limit=4, **shared)  # more: only what is new is played
    assert rules.read_text().startswith(before) and rules.read_text().count("\n") == before.count("\n") * 4 // 3
    with pytest.raises(ValueError, match="heldout_cuont"):
        run(checkpoint, tmp_path / "x", heldout_cuont=3)
    with pytest.raises(ValueError, match="step_limit=12, the recipe says 9"):
        run(checkpoint, tmp_path / "d", step_limit=9, **shared)


def test_a_checkpoint_without_a_recipe_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no recipe\.yaml.*--config"):
        play.main([str(tmp_path / "model")])


def test_a_router_can_be_watched(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(checkpoint), "--count", "2", "--cap", "1", "--seed", "x"]
    assert play.main(words) == 0
    told = capsys.readouterr().out
    assert play.main([*words, "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [first["task"], second["task"]] == ["generated/test/0", "generated/test/1"]
    for episode in (first, second):
        assert sum(step["executor"] == "planner" for step in episode["steps"]) <= 1
        assert episode["cost_usd"] == pytest.approx(episode["executor_usd"] + episode["policy_usd"])
        for step in episode["steps"]:
            left = f"budget left {step['left']:g}"
            assert f"{step['executor']} ({step['probability']:.2f} of {', '.join(step['allowed'])}, {left})" in told
        assert f"score {episode['score']:g}, ${episode['executor_usd']:.6f} for executors" in told
    assert play.main([str(checkpoint), "--count", "1", "--json"]) == 0  # no cap: null, not Infinity
    assert {step["left"] for step in json.loads(capsys.readouterr().out)["steps"]} == {None}
