"""Metrics of the world's columns by hand, alarms in words, and the completions table."""

import math
from pathlib import Path

import pandas as pd
import pytest
from core_helpers import config, dataset, logged, scripted, trainer

from srpo.run.whole import newest
from srpo.trainer.limits import Alarmed
from srpo.trainer.metrics import Alarms, world_metrics

# ------------------------------------------------------------------------------------------------ world's metrics


def test_metrics_of_columns_by_hand():
    columns = {
        "route": ["a", "a", "a", "b", None, "a", "b", "c"],
        "cost": [0.5, 0.25, None, 0.25, 0.0, 0.5, 0.25, 0.25],
        "correct": [1.0, 0.0, None, 0.5, 0.0, 1.0, 1.0, None],
        "note": ["x"] * 8,
    }
    metrics = world_metrics(columns)
    # 8 completions; 7 valid: a 4, b 2, c 1
    entropy = -(4 / 7 * math.log(4 / 7) + 2 / 7 * math.log(2 / 7) + 1 / 7 * math.log(1 / 7))
    assert metrics == {
        "route/share/none": 1 / 8,
        "route/share/a": 4 / 8,
        "route/share/b": 2 / 8,
        "route/share/c": 1 / 8,
        "route/entropy": pytest.approx(entropy),
        "cost/per_query_usd": pytest.approx(2.0 / 7),
        "correct/mean": pytest.approx(3.5 / 6),
    }


def test_metrics_of_calls_by_hand():
    metrics = world_metrics({"calls": [2, 0, 1, None], "members": [["a", "b"], [], ["a"], None]})
    # 3 calls in 3 episodes; a 2 of 3, b 1 of 3: entropy = -(2/3 ln 2/3 + 1/3 ln 1/3) = 0.6365
    assert metrics == {
        "calls/per_query": 1.0,
        "calls/share/a": pytest.approx(2 / 3),
        "calls/share/b": pytest.approx(1 / 3),
        "calls/entropy": pytest.approx(0.6365, abs=1e-4),
    }
    assert world_metrics({"calls": [0, 0], "members": [[], []]}) == {"calls/per_query": 0.0}


def test_metrics_at_the_edges():
    assert world_metrics({}) == {}
    assert world_metrics({"route": [None, None]}) == {"route/share/none": 1.0, "route/entropy": 0}
    assert world_metrics({"route": ["a", "a"]}) == {"route/share/none": 0.0, "route/share/a": 1.0, "route/entropy": 0}
    assert world_metrics({"correct": [None], "cost": []}) == {}


# --------------------------------------------------------------------------------------------------------- alarms

HEALTHY = {
    "entropy": 2.0,
    "completions/mean_length": 50.0,
    "frac_reward_zero_std": 0.5,
    "route/share/none": 0.1,
    "route/share/a": 0.5,
    "route/share/b": 0.4,
    "srpo/failed_share": 0.5,
    "srpo/teacher_available": 0.8,
}
SICK = {
    "entropy": ({"entropy": 0.09}, "entropy fell from 2 to 0.09"),
    "short": ({"completions/mean_length": 16.0}, "went from 50 to 16 tokens"),
    "long": ({"completions/mean_length": 98.0}, "went from 50 to 98 tokens"),
    "kl": ({"kl": 1.2}, "1.2 nats per token away from the reference"),
    "flat": ({"frac_reward_zero_std": 1.0}, "nothing to learn from"),
    "format": ({"route/share/none": 0.6, "route/share/a": 0.4, "route/share/b": 0.0}, "no valid action"),
    "one_member": ({"route/share/none": 0.0, "route/share/a": 0.98, "route/share/b": 0.02}, "a takes 98% of all"),
    "one_callee": ({"calls/entropy": 0.1, "calls/share/a": 0.98, "calls/share/b": 0.02}, "98% of all calls"),
    "no_calls": ({"calls/per_query": 0.02}, "makes 0.02 calls per query"),
    "no_teacher": ({"srpo/teacher_available": 0.0}, "nothing is distilled"),
}
NOT_SICK = {
    "entropy": {"entropy": 0.11},
    "short": {"completions/mean_length": 17.0},
    "long": {"completions/mean_length": 95.0},
    "kl": {"kl": 1.0},
    "flat": {"frac_reward_zero_std": 0.99},
    "format": {"route/share/none": 0.5},
    "one_member": {"route/share/a": 0.97},
    "one_callee": {"calls/entropy": 0.1, "calls/share/a": 0.97, "route/share/a": 1.0},
    "no_calls": {"calls/per_query": 0.03, "route/share/none": 0.97},
    "no_teacher": {"srpo/failed_share": 0.0, "srpo/teacher_available": 0.0},
}


def alarms(interval=3):
    said = []
    return Alarms(interval, said.append), said


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_speaks_once_after_its_interval(name):
    change, words = SICK[name]
    watch, said = alarms()
    watch.observe_step(HEALTHY, max_length=100)
    for _ in range(2):
        watch.observe_step({**HEALTHY, **change}, 100)
    assert said == []
    watch.observe_step(HEALTHY, 100)  # one good step starts the count again
    for _ in range(2):
        watch.observe_step({**HEALTHY, **change}, 100)
    assert said == []
    watch.observe_step({**HEALTHY, **change}, 100)
    assert len(said) == 1 and words in said[0] and "3 logged steps in a row" in said[0]
    for _ in range(10):
        watch.observe_step({**HEALTHY, **change}, 100)
    assert len(said) == 1


@pytest.mark.parametrize("name", NOT_SICK)
def test_an_alarm_is_silent_just_below_its_bound(name):
    watch, said = alarms(1)
    watch.observe_step(HEALTHY, 100)
    for _ in range(3):
        watch.observe_step({**HEALTHY, **NOT_SICK[name]}, 100)
    assert said == []


def test_long_from_the_start_is_not_a_collapse():
    watch, said = alarms(1)
    for _ in range(3):
        watch.observe_step({"completions/mean_length": 99.0}, 100)
    assert said == []


def test_a_fall_below_the_best_evaluation_is_said_once():
    watch, said = alarms()
    for reward in (0.5, 0.8, 0.65):
        watch.observe_evaluation(reward)
    assert said == []
    watch.observe_evaluation(0.63)  # 0.8 - 0.63 > 20 % of 0.8
    assert len(said) == 1 and "0.630" in said[0] and "0.800" in said[0]
    watch.observe_evaluation(0.1)
    assert len(said) == 1
    negative, said = alarms()
    negative.observe_evaluation(-1.0)
    negative.observe_evaluation(-1.1)
    assert said == []
    negative.observe_evaluation(-1.3)
    assert len(said) == 1


def test_the_trainer_raises_them(tmp_path):
    made = trainer(
        config(tmp_path, max_steps=4, diagnostics_warning_interval=3),
        rewards=lambda completions, **_: [0.0] * len(completions),
        world=lambda rows, texts: {"route": [None] * len(texts)},
    )
    said = []
    made.alarms._warn = said.append
    made.train()
    assert sorted(text.split()[0] for text in said) == ["All", "More", "No"]  # flat rewards, no action, no teacher


def test_a_warning_that_stop_on_names_ends_the_run_with_a_checkpoint(tmp_path):
    settings = {"max_steps": 9, "diagnostics_warning_interval": 2, "objective": "grpo"}
    no_reward = {"rewards": lambda completions, **_: [0.0] * len(completions)}
    made = trainer(config(tmp_path, stop_on=["kl", "flat"], **settings), **no_reward)
    with pytest.raises(
        Alarmed, match=r"^stop_on flat: All completions of every group .*\. A checkpoint was saved in "
    ):
        made.train()
    assert newest(tmp_path) == tmp_path / "checkpoint-2"
    trainer(config(tmp_path / "on", stop_on=["kl"], **settings), **no_reward).train()
    with pytest.raises(ValueError, match=r"stop_on='flatt' is not one of entropy, length, kl"):
        config(tmp_path, stop_on=["flatt"])


def test_a_lower_held_out_reward_can_end_the_run_too(tmp_path):
    found = iter([0.8, 0.6, 0.9])
    settings = {"eval_strategy": "steps", "eval_steps": 1, "stop_on": ["heldout"], "objective": "grpo"}
    made = trainer(config(tmp_path, max_steps=3, **settings), heldout=lambda: {"reward": next(found)})
    with pytest.raises(Alarmed, match=r"stop_on heldout: The held-out reward is 0.600, it was 0.800 at the best"):
        made.train()
    assert newest(tmp_path) == tmp_path / "checkpoint-2"


# ------------------------------------------------------------------------------------------- the completions table


def exact(completions, **_):
    return [float(len(c[0]["content"]) % 2) for c in completions]


def brief(completions, log_extra, **_):
    log_extra("length", [len(c[0]["content"]) for c in completions])
    return [-len(c[0]["content"]) / 100 for c in completions]


def world(rows, texts):
    assert all(row["query_id"].startswith("q") for row in rows)
    routes = ["small" if len(text) % 2 else None for text in texts]
    return {"route": routes, "cost": [0.01] * len(texts), "feedback": ["no"] * len(texts)}


def test_the_table_holds_every_reward_part_the_columns_and_the_branch(tmp_path):
    args = config(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        log_completions=True,
        num_completions_to_print=0,
        include_environment_feedback=True,
        per_device_eval_batch_size=8,
    )
    made = trainer(args, rewards=[exact, brief], world=world, eval_dataset=dataset(4))
    made.train()
    table = pd.read_parquet(Path(tmp_path) / "completions" / "completions_00002.parquet")
    columns = {"step", "prompt", "completion", "exact", "brief", "length", "advantage"}
    assert columns | {"route", "cost", "feedback", "branch"} <= set(table.columns)
    assert len(table) == 16 and set(table["step"]) == {2}
    texts = [messages[0]["content"] for messages in table["completion"]]
    prompts = list(made._logs["prompt"])
    assert texts == [c[0]["content"] for c in decoded(prompts, made)]  # rows belong together
    assert table["exact"].tolist() == [float(len(t) % 2) for t in texts]
    assert table["brief"].tolist() == pytest.approx([-len(t) / 100 for t in texts])
    assert table["length"].tolist() == [len(t) for t in texts]
    assert [None if pd.isna(r) else r for r in table["route"]] == ["small" if len(t) % 2 else None for t in texts]
    assert set(table["branch"]) == {"grpo", "sdpo"}
    assert (table["branch"] == "sdpo").mean() == logged(made, "srpo/distilled_share")[1]

    made.evaluate()
    table = pd.read_parquet(Path(tmp_path) / "completions" / "completions_00002.parquet")
    assert columns | {"route", "cost", "branch"} <= set(table.columns)
    assert set(table["branch"]) == {"grpo"}
    entry = made.state.log_history[-1]
    assert entry["eval_cost/per_query_usd"] == pytest.approx(0.01)
    assert {"eval_reward", "eval_rewards/exact/mean", "eval_route/share/none", "eval_route/share/small"} <= set(entry)


def decoded(prompts, made):
    ids = scripted(prompts, made)["completion_ids"]
    return [[{"content": made.processing_class.decode(one, skip_special_tokens=True)}] for one in ids]


def test_the_logged_metrics_a_person_needs(tmp_path):
    made = trainer(config(tmp_path, max_steps=1), world=world)
    made.train()
    entry = made.state.log_history[0]
    assert {
        "srpo/distilled_share",
        "srpo/failed_share",
        "srpo/teacher_available",
        "srpo/weight_mean",
        "srpo/weight_max",
        "srpo/weight_ess",
        "srpo/teacher_entropy",
        "srpo/gradient_share",
        "loss/grpo",
        "loss/sdpo",
        "route/entropy",
        "cost/per_query_usd",
        "rewards/binary_reward/mean",
    } <= set(entry)
    assert entry["srpo/weight_mean"] == pytest.approx(1.0, abs=1e-6)
    assert entry["loss"] == pytest.approx(entry["loss/grpo"] + entry["loss/sdpo"], abs=1e-6)
    assert 0 < entry["srpo/gradient_share"] < 1 and 0 < entry["srpo/weight_ess"] <= 1 < entry["srpo/weight_max"]
