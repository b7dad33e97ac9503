"""Columns of users beside words of ours; values that no table can hold; and a run that goes on."""

import functools
import json
import logging

import pyarrow.parquet as pq
import pytest
import torch
from core_helpers import config, dataset, logged, model, tokenizer, trainer
from episode_worlds import ScriptedEnvironment

from srpo.checks import check_rows
from srpo.columns import INTERNAL, checked_columns, repaired_value
from srpo.texts import well_formed, without_control_tokens
from srpo.trainer.metrics import writable_table
from srpo.types import Observation


class Graded(ScriptedEnvironment):
    """Every episode is over after one turn."""

    def __init__(self):
        super().__init__(lambda row, t, text: Observation(end="done"))


# ---------------------------------------------------------------------------------------------- names that collide


def run(folder, reward=None, data=None, steps=1, **kwargs):
    """A finished run of plain sampling; the calls of its reward function."""
    calls = []

    def watched(completions, **columns):
        calls.append(columns)
        return [float(i % 2) for i in range(len(completions))] if reward is None else reward(completions, **columns)

    settings = {"objective": "grpo", "max_steps": steps, **kwargs.pop("config", {})}
    made = trainer(config(folder, **settings), rewards=watched, train_dataset=data or dataset(), **kwargs)
    made.train()
    return made, calls


def with_column(name, values=lambda i: False):
    return dataset().map(lambda row, i: {name: values(i)}, with_indices=True)


def table(folder, step=1):
    return pq.read_table(folder / "completions" / f"completions_{step:05d}.parquet").to_pydict()


@pytest.mark.parametrize("values", [lambda i: False, lambda i: True, lambda i: "the keys", lambda i: i])
def test_a_dataset_column_named_lost_is_an_ordinary_column(tmp_path, values):
    data = with_column("lost", values)
    for world in (None, lambda rows, texts: {"cost": [0.5] * len(rows)}):
        made, calls = run(tmp_path, data=data, world=world)
        assert len(calls) == 1 and set(calls[0]["lost"]) <= {values(i) for i in range(16)}
        assert logged(made, "reward") == [0.5] and INTERNAL + "lost" not in calls[0]


def test_a_world_says_what_is_lost_in_words(tmp_path):
    def world(rows, texts):
        return {"lost": [None, "503: busy", "", None] * (len(rows) // 4)}

    _, calls = run(tmp_path, world=world, reward=lambda completions, **_: [1.0] * len(completions))
    assert calls[0]["lost"] == [None, "", None] * 4  # 12 of 16; the fourth of each group is not scored
    assert table(tmp_path)["lost"] == [None, "503: busy", "", None] * 4


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("lost", False), ("lost", True), ("lost", float("nan")), ("lost", 0),
        ("cost", "cheap"), ("cost", 10**400), ("correct", "yes"), ("correct", [1.0]), ("calls", {}),
        ("members", 3), ("members", "small"), ("members", [1]), ("feedback", 4.0),
    ],
)  # fmt: skip
def test_a_world_column_that_means_something_else_is_named(tmp_path, column, value):
    def world(rows, texts):
        return {column: [None] * 2 + [value] * (len(rows) - 2)}

    with pytest.raises(ValueError, match=rf"the world's column '{column}' must be .*; row 2 has"):
        run(tmp_path, world=world)


@pytest.mark.parametrize(
    "column",
    [
        "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments",
        "srpo/lost",
    ],
)  # fmt: skip
def test_names_that_trl_passes_to_rewards_are_refused(tmp_path, column):
    with pytest.raises(ValueError, match=f"the dataset's column '{column}' must be renamed"):
        trainer(config(tmp_path), train_dataset=with_column(column))
    with pytest.raises(ValueError, match=f"the dataset's column '{column}' must be renamed"):
        trainer(config(tmp_path), eval_dataset={"held out": with_column(column)})
    with pytest.raises(ValueError, match=f"the world's column '{column}'"):
        run(tmp_path, world=lambda rows, texts: {column: [1] * len(rows)})


@pytest.mark.parametrize("column", ["image", "images"])
def test_pictures_are_not_for_a_policy_that_reads_text(tmp_path, column):
    with pytest.raises(ValueError, match=f"column '{column}' must be renamed or removed.*reads text only"):
        trainer(config(tmp_path), train_dataset=with_column(column))
    with pytest.raises(ValueError, match=f"column '{column}' must be renamed or removed"):
        trainer(config(tmp_path), eval_dataset={"held out": with_column(column)})
    for nothing in (None, []):  # as merging datasets leaves it
        made, calls = run(tmp_path, data=with_column(column, lambda i, value=nothing: value))
        assert len(calls) == 1 and logged(made, "reward") == [0.5]


@pytest.mark.parametrize("column", ["step", "prompt", "completion", "advantage", "branch", "watched"])
def test_names_of_the_completions_table_are_refused(tmp_path, column):
    with pytest.raises(ValueError, match=f"'{column}'"):
        run(tmp_path, world=lambda rows, texts: {column: [1] * len(rows)})
    with pytest.raises(ValueError, match=f"'{column}' is taken"):
        run(tmp_path, reward=lambda completions, log_extra, **_: log_extra(column, [1] * len(completions)))


@pytest.mark.parametrize("column", ["lost", "stop", "turns"])
def test_the_rollouts_own_columns_cannot_be_a_datasets_or_an_episodes(tmp_path, column):
    args = config(tmp_path, objective="grpo")
    with pytest.raises(ValueError, match=f"the dataset's column '{column}' must be renamed"):
        trainer(args, rollout_func=None, environment=Graded(), train_dataset=with_column(column))

    class Own(Graded):
        def episode(self, row, seed):
            made = super().episode(row, seed)
            columns = made.columns
            made.columns = lambda stop: {**columns(stop), column: True}
            return made

    made = trainer(args, rollout_func=None, environment=Own())
    with pytest.raises(ValueError, match=f"column '{column}'"):
        made.train()
    made.rollouts.close()


def test_dataset_and_world_may_repeat_but_not_contradict_each_other(tmp_path):
    data = with_column("family", lambda i: f"f{i}")
    _, calls = run(tmp_path, data=data, world=lambda rows, texts: {"family": [r["family"] for r in rows]})
    assert len(calls) == 1
    _, calls = run(tmp_path, data=data, world=lambda rows, texts: {"family": [None] * len(rows)})
    assert None not in calls[0]["family"]
    for odd in (lambda i: float("nan"), lambda i: [float("nan"), i], lambda i: {"a": i}):
        data_of = with_column("family", odd)
        assert len(run(tmp_path, data=data_of, world=lambda rows, _: {"family": [r["family"] for r in rows]})[1]) == 1
    with pytest.raises(ValueError, match=r"both the dataset and the world have a column 'family'.*row 0: 'f"):
        run(tmp_path, data=data, world=lambda rows, texts: {"family": ["other"] * len(rows)})


def test_reward_functions_need_names_of_their_own(tmp_path):
    def good(completions, **_):
        return [0.0] * len(completions)

    def advantage(completions, **_):
        return [0.0] * len(completions)

    made = trainer(config(tmp_path, objective="grpo"), rewards=[good, lambda completions, **_: [1.0] * 16, good])
    assert made.reward_func_names == ["good", "<lambda>", "good_2"]
    made.train()
    assert [table(tmp_path)[name][0] for name in made.reward_func_names] == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="'advantage' needs another name: the completions table"):
        trainer(config(tmp_path), rewards=[advantage])


@pytest.mark.parametrize(("name", "value"), [("reward", 1.0), ("route/share/a", 1.0), ("mine", "high")])
def test_metrics_of_others_keep_out_of_ours(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"log_metric: .*'{name}'"):
        run(tmp_path, reward=lambda completions, log_metric, **_: log_metric(name, value))

    class Own(Graded):
        def metrics(self):
            return {name: value}

    made = trainer(config(tmp_path, objective="grpo"), rollout_func=None, environment=Own())
    with pytest.raises(ValueError, match=f"the environment's metrics: .*'{name}'"):
        made.train()
    made.rollouts.close()


# ----------------------------------------------------------------------------------- values that no table can hold

ODD = {
    "surrogate": lambda i: "x\ud835y" if i == 1 else "plain",
    "mixed": lambda i: [1, "one", 2.5, None][i % 4],
    "empty": lambda i: {},
    "huge": lambda i: 10**30 + i,
    "endless": lambda i: 10**5000,
    "tensor": lambda i: torch.arange(3),
    "nested": lambda i: {"a": [{"b": "x\ud800"}]} if i == 2 else {"a": 3},
    "object": lambda i: object(),
    "bytes": lambda i: b"\xff" if i else "text",
    "circular": lambda i: circular(),
    "deep": lambda i: functools.reduce(lambda inner, _: [inner], range(3000), 1),
}


def circular():
    value = []
    value += [value, value]
    return value


def test_no_value_of_a_world_or_a_reward_ends_a_run(tmp_path, caplog):
    logging.getLogger("srpo").propagate = True

    def world(rows, texts):
        odd = {name: [value(i) for i in range(len(rows))] for name, value in ODD.items()}
        return {**odd, "a name\ud800": [1] * len(rows)}

    def reward(completions, log_extra, **columns):
        log_extra("logged name\ud800", [1] * len(completions))
        for name, value in ODD.items():
            log_extra(f"logged {name}", [value(i) for i in range(len(completions))])
        return [1.0] * len(completions)

    with caplog.at_level(logging.WARNING):
        made, calls = run(tmp_path, world=world, reward=reward, steps=2)
    assert made.state.global_step == 2
    found = table(tmp_path, 2)
    for prefix in ("", "logged "):
        assert found[prefix + "surrogate"][:3] == ["plain", "x\ufffdy", "plain"]
        assert found[prefix + "mixed"][:4] == ["1", "one", "2.5", None]
        assert found[prefix + "empty"] == ["{}"] * 16
        assert found[prefix + "huge"][1] == str(10**30 + 1)
        assert found[prefix + "endless"] == ["<int>"] * 16
        assert "tensor" in found[prefix + "tensor"][0]
        assert found[prefix + "circular"] == ["[[...], [...]]"] * 16 and found[prefix + "deep"] == ["<list>"] * 16
    assert found["a name\ufffd"] == found["logged name\ufffd"] == [1] * 16
    # Of 16 values in each: mixed 8 that are neither text nor None, and all of empty, huge, endless, tensor, nested,
    # object, circular and deep: 8 + 8 * 16 = 136, once of the world and once of the reward. Bytes and texts have a
    # common type.
    assert logged(made, "records/as_text") == [272.0] * 3  # two steps, and the end
    assert logged(made, "records/repaired") == [3.0, 3.0]  # "surrogate", "nested" and the name
    assert calls[0]["surrogate"][1] == "x\ufffdy"  # rewards read what can be encoded
    said = [r.getMessage() for r in caplog.records if "Completions table" in r.getMessage()]
    assert len(said) == 2 and "mixed" in said[1] and "column 'surrogate', row 1" in said[0]


def test_text_of_values_by_hand():
    found, texts = writable_table({"a": ["\ud800", "b", None], "b": [1, 2, 3], "c": [{}, None, {"x": 1}]})
    assert found["a"] == ["\\ud800", "b", None] and found["b"] == [1, 2, 3]
    assert texts == {"a": 1}  # {} beside another mapping has a type


def test_a_column_that_is_logged_now_and_then_never_shows_old_values(tmp_path):
    steps = []

    def reward(completions, log_extra, **_):
        steps.append(1)
        if len(steps) == 2:
            log_extra("note", ["second"] * len(completions))
        return [1.0] * len(completions)

    run(tmp_path, reward=reward, steps=3)
    assert "note" not in table(tmp_path, 1)
    assert set(table(tmp_path, 2)["note"]) == {"second"} and set(table(tmp_path, 3)["note"]) == {None}


@pytest.mark.parametrize("values", [["one"], ["x"] * 17])
def test_log_extra_of_another_length_is_named(tmp_path, values):
    with pytest.raises(ValueError, match=f"column 'note' got {len(values)} values for 16 completions"):
        run(tmp_path, reward=lambda completions, log_extra, **_: log_extra("note", values))


def test_a_writer_that_fails_is_counted_and_said_once(tmp_path, caplog):
    logging.getLogger("srpo").propagate = True
    made = trainer(config(tmp_path, objective="grpo", max_steps=3))
    (tmp_path / "completions").rmdir()
    (tmp_path / "completions").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        made.train()
    assert made.state.global_step == 3 and logged(made, "records/failed") == [1.0, 2.0, 3.0]
    assert len([r for r in caplog.records if "the run goes on" in r.getMessage()]) == 1


def test_feedback_that_is_no_unicode_reaches_the_teacher(tmp_path):
    def world(rows, texts):
        return {"feedback": ["no: \ud835"] * len(rows)}

    settings = {"objective": "sdpo", "include_environment_feedback": True}
    made, _ = run(tmp_path, reward=lambda completions, **_: [0.0] * len(completions), world=world, config=settings)
    assert logged(made, "srpo/teacher_available") == [1.0]


# ------------------------------------------------------------------------------------------------- where they come in


def test_rows_of_any_column_are_checked(tmp_path):
    rows = [{"prompt": f"p{i}", "query_id": i, "gold": ["a"], "note": "x", "size": i} for i in range(12)]
    rows[1]["gold"] = ["a", "b\ud800"]
    rows[2]["note"] = 5
    rows[3]["size"] = 10**30
    rows[4]["extra"] = {"deep": {"x": "\udfff"}}
    rows[5]["size"] = "5"
    rows[6]["gold"] = "a"
    rows[7]["note"] = object()
    rows[8]["gold"] = [1]
    good = check_rows(rows, quarantine_path=tmp_path / "q.jsonl", max_bad_share=1.0)
    found = {e["row"]: e["detail"] for e in map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())}
    assert good["query_id"] == [0, 9, 10, 11] and sorted(found) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found[1] == "column 'gold' is not valid Unicode at character 1"
    assert found[2] == "note is a number, in most rows a str"
    assert found[3].startswith("size cannot be part of a dataset: ")
    assert found[6] == "gold is a str, in most rows a list"


def test_texts_by_hand():
    assert well_formed("ü\ud835y") == "ü\ufffdy" and well_formed("\ud835\udd38") == "𝔸"
    assert repaired_value(["a", ("\ud800", {"\udfff": 1}), 3]) == (["a", ("\ufffd", {"\ufffd": 1}), 3], 2)
    assert checked_columns({"cost": torch.tensor([0.5, 1.0])}, [{}, {}], ()) == ({"cost": [0.5, 1.0]}, [])
    clean = without_control_tokens(tokenizer())
    assert clean("a\ud800 <|im_end|>") == "a\ufffd < |im_end|>"  # questions and views of agents
    with pytest.raises(ValueError, match="returned a list, not a dict"):
        checked_columns([1], [{}], ())


def test_an_observation_that_is_none_loses_its_episode_and_frames_are_repaired(tmp_path):
    from srpo.texts import encode_frame

    assert encode_frame(tokenizer(), "a\ud800") == encode_frame(tokenizer(), "a\ufffd")

    class Wrong(Graded):
        def episode(self, row, seed):
            made = super().episode(row, seed)

            async def step(text):
                return "a text"

            made.step = step
            return made

    made = trainer(
        config(tmp_path, objective="grpo", max_lost_batches=9), model(), rollout_func=None, environment=Wrong()
    )
    made.train()
    assert "step returned a str, not an Observation" in "".join(map(str, table(tmp_path)["lost"]))
