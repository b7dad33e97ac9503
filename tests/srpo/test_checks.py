"""Bad rows and bad rewards are named, and never become a training signal."""

import asyncio
import inspect
import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from srpo.checks import BadRows, check_rows
from srpo.columns import LOST_ROW
from srpo.trainer.rewards import checked_reward


class Words:
    """A tokenizer of one token per word; its chat template adds three tokens per message and two at the end."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text.split())}

    def apply_chat_template(
        self, messages: list[Any], *, add_generation_prompt: bool, tokenize: bool, return_dict: bool, **_: Any
    ) -> dict[str, list[int]]:
        assert add_generation_prompt and tokenize and return_dict
        return {"input_ids": [1] * (sum(len(m["content"].split()) + 3 for m in messages) + 2)}


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def thousand_rows() -> tuple[list[dict[str, Any]], dict[int, str]]:
    """1,000 rows, of which 50 are bad: ten kinds, five rows each; and the reason that each must be given."""
    rows: list[dict[str, Any]] = [{"prompt": user(f"query number {i}"), "query_id": f"q{i}"} for i in range(1000)]
    kinds: list[tuple[str, Any]] = [
        ("null prompt", lambda row, i: row.update(prompt=None)),
        ("missing prompt", lambda row, i: row.pop("prompt")),
        ("wrong type", lambda row, i: row.update(prompt=17)),
        ("empty prompt", lambda row, i: row.update(prompt=[])),
        ("empty prompt", lambda row, i: row.update(prompt=user("  \n"))),
        ("malformed messages", lambda row, i: row.update(prompt=[{"content": "no role"}])),
        ("malformed messages", lambda row, i: row.update(prompt=[*user("a"), {"role": "assistant", "content": "b"}])),
        ("invalid text", lambda row, i: row.update(prompt=user("broken \ud800 surrogate"))),
        ("duplicate id", lambda row, i: row.update(query_id=f"q{i - 1}")),
        ("over-long prompt", lambda row, i: row.update(prompt=user("word " * 100_000))),
    ]
    expected = {}
    for k, (reason, spoil) in enumerate(kinds):
        for j in range(5):
            index = 1 + k * 97 + j * 7
            spoil(rows[index], index)
            expected[index] = reason
    assert len(expected) == 50
    return rows, expected


def test_lost_rows_are_not_shown_to_a_reward_function():
    seen, logged = [], []

    def func(completions, gold, log_extra, trainer_state):
        seen.append((completions, gold, trainer_state))
        log_extra("note", [g.upper() for g in gold])
        return [1.0, None]

    columns = {"gold": ["a", "b", "c"], LOST_ROW: [None, "503", None], "trainer_state": "s"}
    values = checked_reward(func)(
        completions=["x", "y", "z"], log_extra=lambda name, found: logged.append((name, found)), **columns
    )
    assert values == [1.0, None, None] and seen == [(["x", "z"], ["a", "c"], "s")]
    assert logged == [("note", ["A", None, "C"])]
    nobody = checked_reward(lambda **_: 1 / 0)
    assert nobody(completions=["x"], **{LOST_ROW: ["timeout"]}) == [None]
    data = checked_reward(lambda completions, lost: [float(x) for x in lost])  # a column of the user's own
    assert data(completions=["x", "y"], lost=[False, True], **{LOST_ROW: [None, None]}) == [0.0, 1.0]


def test_fifty_bad_rows_of_a_thousand_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, expected = thousand_rows()
    path = tmp_path / "run" / "quarantine.jsonl"
    with caplog.at_level(logging.WARNING):
        good = check_rows(rows, tokenizer=Words(), max_prompt_length=64, quarantine_path=path)

    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {entry["row"]: entry["reason"] for entry in entries} == expected
    assert good["query_id"] == [row["query_id"] for i, row in enumerate(rows) if i not in expected]
    assert len(good) == 950
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "50 of 1000" in warnings[0] and "10 empty prompt" in warnings[0] and "5 duplicate id" in warnings[0]
    assert all(len(entry["content"]) <= 200 for entry in entries)  # a 100,000-token prompt is not copied


def test_strict_raises_and_still_writes_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": "fine", "query_id": "a"}, {"prompt": None, "query_id": "b"}]
    with pytest.raises(BadRows, match=r"1 of 2 .*row 1: prompt is null"):
        check_rows(rows, quarantine_path=tmp_path / "q.jsonl", strict=True)
    assert json.loads((tmp_path / "q.jsonl").read_text())["row"] == 1


def test_no_good_row_is_an_error_even_when_not_strict(tmp_path: Path) -> None:
    with pytest.raises(BadRows, match="no row can be used"):
        check_rows(Dataset.from_dict({"question": ["a", "b"]}), quarantine_path=tmp_path / "q.jsonl")


def test_a_good_dataset_comes_back_as_it_is_and_clears_an_old_quarantine(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("left by an earlier run\n")
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "query_id": [1, 2]})
    assert check_rows(dataset, quarantine_path=path) is dataset
    assert not path.exists()


def test_length_counts_the_chat_template(tmp_path: Path) -> None:
    # One message of n words: n + 3 for the message + 2 for the generation prompt.
    rows = [{"prompt": user("a b c d e")}, {"prompt": user("a b c d e f")}, {"prompt": "a b c d e f g h i j"}]
    good = check_rows(rows[:2], tokenizer=Words(), max_prompt_length=10, quarantine_path=tmp_path / "q.jsonl")
    assert len(good) == 1
    assert "11 tokens, at most 10" in (tmp_path / "q.jsonl").read_text()
    plain = check_rows(rows[2:], tokenizer=Words(), max_prompt_length=10, quarantine_path=tmp_path / "r.jsonl")
    assert len(plain) == 1


def test_length_with_a_real_tokenizer(tmp_path: Path, tiny_tokenizer: Any) -> None:
    prompt = user("What is 12 plus 30?")
    length = len(tiny_tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
    dataset = Dataset.from_list([{"prompt": prompt}, {"prompt": user("7")}])
    kept = check_rows(
        dataset, tokenizer=tiny_tokenizer, max_prompt_length=length - 1, quarantine_path=tmp_path / "q.jsonl"
    )
    assert kept["prompt"][0] == user("7") and len(kept) == 1
    assert (
        check_rows(dataset, tokenizer=tiny_tokenizer, max_prompt_length=length, quarantine_path=tmp_path / "q.jsonl")
        is dataset
    )


def test_the_first_of_two_rows_with_one_id_is_kept_and_a_bad_row_does_not_take_the_id(tmp_path: Path) -> None:
    rows = [
        {"prompt": None, "query_id": "x"},
        {"prompt": "one", "query_id": "x"},
        {"prompt": "two", "query_id": "x"},
        {"prompt": "three", "query_id": None},
    ]
    assert check_rows(rows, quarantine_path=tmp_path / "q.jsonl")["prompt"] == ["one"]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert reasons == ["null prompt", "duplicate id", "null id"]


def reward_of(values: Any) -> Any:
    def my_reward(completions: list[str], **kwargs: Any) -> Any:
        return values

    return my_reward


def test_good_rewards_pass_and_none_stays_none() -> None:
    checked = checked_reward(reward_of([1, 0.5, None]))
    assert checked.__name__ == "my_reward"
    assert checked(completions=["a", "b", "c"]) == [1.0, 0.5, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, math.nan], r"'my_reward' returned for row 1 \(query_id 'q1'\) nan"),
        ([0.0, math.inf], r"row 1 .* inf"),
        ([0.0, "1"], r"row 1 .* '1' of type str"),
        ([[0.0], 1.0], r"row 0 .* of type list"),
        ([0.0], r"'my_reward' returned 1 values for 2 completions"),
        ([0.0, 1.0, 2.0], r"returned 3 values for 2 completions"),
        (None, r"returned a NoneType"),
        ("ab", r"returned a str"),
        (0.5, r"returned a float"),
    ],
)
def test_bad_rewards_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_reward(reward_of(values))(prompts=["p", "p"], completions=["a", "b"], query_id=["q0", "q1"])


def test_tensors_and_arrays_are_lists_too() -> None:
    import numpy as np
    import torch

    assert checked_reward(reward_of(torch.tensor([1.0, 2.0])))(completions=["a", "b"]) == [1.0, 2.0]
    assert checked_reward(reward_of(np.array([1, 2])))(completions=["a", "b"]) == [1.0, 2.0]
    assert checked_reward(reward_of([np.float32(0.5), torch.tensor(0.25)]))(completions=["a", "b"]) == [0.5, 0.25]


def test_async_rewards_stay_async() -> None:
    async def slow(completions: list[str], **kwargs: Any) -> list[float]:
        return [math.nan for _ in completions]

    checked = checked_reward(slow)
    assert inspect.iscoroutinefunction(checked) and checked.__name__ == "slow"
    with pytest.raises(ValueError, match="'slow' returned for row 0 nan"):
        asyncio.run(checked(completions=["a"]))


def test_callables_without_a_name_get_one() -> None:
    class Judge:
        def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            return [1.0]

    assert checked_reward(Judge()).__name__ == "Judge"
    part = checked_reward(partial(reward_of([1.0])))
    assert part.__name__ == "my_reward" and part(completions=["a"]) == [1.0]


def test_an_object_with_an_async_call_is_awaited() -> None:
    class Judge:
        async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            return [math.inf]

    checked = checked_reward(Judge())
    assert inspect.iscoroutinefunction(checked)
    with pytest.raises(ValueError, match="'Judge' returned for row 0 inf"):
        asyncio.run(checked(completions=["a"]))


def test_a_value_of_another_type_than_the_column_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "gold": ["x"], "level": i, "note": None} for i in range(40)]
    rows[7]["gold"], rows[9]["level"], rows[11]["level"] = "x", "high", 0.5
    good = check_rows(rows, quarantine_path=tmp_path / "q.jsonl", max_bad_share=0.05)
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(e["row"], e["reason"], e["detail"]) for e in entries] == [
        (7, "mixed types", "gold is a str, in most rows a list"),
        (9, "mixed types", "level is a str, in most rows a number"),
    ]
    assert len(good) == 38 and good["level"][9] == 0.5


def test_more_bad_rows_than_the_share_stop_the_run(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}"} for i in range(20)]
    rows[3] = {"prompt": None}
    assert len(check_rows(rows, quarantine_path=tmp_path / "q.jsonl", max_bad_share=0.05)) == 19
    with pytest.raises(BadRows, match=r"1 of 20 dataset rows are bad .*at most 0\.04 of them may be"):
        check_rows(rows, quarantine_path=tmp_path / "q.jsonl", max_bad_share=0.04)
    with pytest.raises(ValueError, match=r"max_bad_share=1\.5"):
        check_rows(rows, quarantine_path=tmp_path / "q.jsonl", max_bad_share=1.5)
