"""What does not answer in time is killed, in real processes: it is lost by name, and what comes after it is scored."""

import asyncio
import functools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import late_rewards
import pytest
from core_helpers import config, dataset, logged, script, scripted, trainer

from rewards.registry import REWARDS, Facts
from srpo.losses import noted
from srpo.trainer.late import world_one_by_one
from srpo.trainer.limits import LostRollouts
from srpo.trainer.rewards import checked_reward
from srpo.types import LOST, Columns

SECONDS = 2.0
ROOT = Path(__file__).resolve().parents[2]


def asked(func: Any, texts: list[str], **columns: Any) -> tuple[list[Any], list[Any]]:
    """Values, and causes of what is lost."""
    told: list[Any] = []
    made = checked_reward(func, None, SECONDS, told.extend)
    values = made(prompts=texts, completions=texts, **columns)
    return (asyncio.run(values) if asyncio.iscoroutine(values) else values), told


@pytest.mark.parametrize("how", ["loop", "sleep", "C"])
def test_a_completion_that_takes_for_ever_is_lost_and_the_next_is_scored(how: str) -> None:
    values, told = asked(late_rewards.length, ["ab", how, "abc"])
    assert values == [2.0, None, 3.0]
    assert told == [None, "reward function 'length' gave no answer within 2 s (reward_deadline)", None]


def test_a_process_that_dies_loses_its_completion_and_no_other() -> None:
    values, told = asked(late_rewards.length, ["die", "a", "exit", "ab"])
    assert values == [None, 1.0, None, 2.0]
    assert [told[0], told[2]] == [
        "the process of reward function 'length' was ended by SIGSEGV",
        "the process of reward function 'length' ended with code 3",
    ]


def test_what_the_run_is_told_ends_what_the_function_has_started_but_not_its_process() -> None:
    assert asked(late_rewards.length, ["told", "a"]) == ([4.0, 1.0], [None, None])


def test_what_it_has_started_is_killed_with_it(tmp_path: Path) -> None:
    values, _ = asked(late_rewards.length, [f"child:{tmp_path / 'pid'}"])
    child = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 60
    while time.monotonic() < until and os.path.exists(f"/proc/{child}"):
        if "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():  # nobody in a container reaps it
            break
        time.sleep(0.05)
    else:
        assert not os.path.exists(f"/proc/{child}")
    assert values == [None]


def test_what_it_raises_ends_the_run_with_its_row_and_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="reward function 'length' raised KeyError: 'planted'") as found:
        asked(late_rewards.length, ["a", "raise"], query_id=["q0", "q1"])
    notes = "\n".join(found.value.__notes__)
    assert "row 1 of the batch, query_id 'q1'" in notes and re.search(r"late_rewards.py.*in _act", notes)


def test_columns_shared_values_and_logs_go_there_and_back() -> None:
    extra: dict[str, Any] = {}
    metrics: list[Any] = []
    values, _ = asked(
        late_rewards.telling,
        ["a", "bc"],
        trainer_state=7,
        log_extra=lambda name, values: extra.update({name: values}),
        log_metric=lambda *given: metrics.append(given),
    )
    assert (values, extra, metrics) == ([7.0, 7.0], {"said": ["A", "BC"]}, [("letters", 1), ("letters", 2)])
    assert asked(functools.partial(late_rewards.Longer(3)), ["a"])[0] == [4.0]


def test_an_async_one_is_cancelled_and_the_others_are_scored() -> None:
    values, told = asked(late_rewards.awaited, ["ab", "sleep", "a"])
    assert values == [2.0, None, 1.0] and [bool(cause) for cause in told] == [False, True, False]


def test_closures_and_rewards_of_factories_go_there_with_what_they_hold() -> None:
    weight, inner = 0.5, late_rewards.length

    def mine(completions: list[str], **columns: Any) -> list[float]:
        return [weight * value for value in inner(completions, **columns)]

    values, told = asked(mine, ["abc", "sleep", "die", "ab"])
    assert values == [1.5, None, None, 1.0]
    assert told[1] == "reward function 'mine' gave no answer within 2 s (reward_deadline)"
    columns: dict[str, Any] = {"cost": [0.25, 2.0], "cost_weight": [1.0, 0.5], "correct": [1.0, 0.0]}
    facts = Facts(0.5, per_prompt=True)
    for name, make in REWARDS.items():
        here, there = (checked_reward(make(facts), None, seconds, lambda causes: None) for seconds in (None, SECONDS))
        given = {
            "prompts": ["p", "q"],
            "completions": ["a", "c"],
            "answer": ["a", None],
            "em": [1.0, 0.0],
            "f1": [0.5, 0.0],
            "format_error": ["", "x"],
        }
        given |= {"invalid_actions": [0, 1], **columns}
        assert here(**given) == there(**given), name


def test_a_function_of_the_script_that_was_started_goes_there(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "from srpo.trainer.rewards import checked_reward\n"
        "BONUS = 2.0\n"
        "def judge(completions, **_):\n"
        "    while completions == ['for ever']: pass\n"
        "    return [BONUS + len(text) for text in completions]\n"
        "if __name__ == '__main__':\n"
        "    print(checked_reward(judge, None, 2.0, print)(completions=['for ever', 'ab']))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[None, 4.0]", done.stderr


def test_a_function_that_cannot_go_there_is_refused_at_once() -> None:
    held = threading.Lock()
    with pytest.raises(ValueError, match="reward_deadline: reward function '<lambda>' cannot run in a process of its"):
        checked_reward(lambda completions, **_: [float(held.locked())], None, SECONDS, None)


def test_a_world_that_does_not_answer_loses_the_completion() -> None:
    columns = world_one_by_one(late_rewards.world, SECONDS)([{}, {}, {}], ["ab", "sleep", "a"])
    assert columns["cost"] == [2.0, None, 1.0]
    assert columns[LOST] == [None, "the world gave no answer within 2 s (world_deadline)", None]


def test_in_a_training_it_is_counted_and_too_many_stop_the_run(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=4, reward_deadline=4.0, max_lost_share=0.01, max_lost_batches=2)
    args.per_device_train_batch_size = 4
    made = trainer(args, rewards=late_rewards.late_for, rollout_func=scripted, train_dataset=dataset(8))
    with pytest.raises(LostRollouts, match=r"x reward function 'late_for' gave no answer within 4 s"):
        made.train()
    shares = logged(made, "rollout/lost_share")
    cause = "reward function 'late_for' gave no answer within 4 s (reward_deadline)"
    lines = noted(tmp_path)
    assert [(line["step"], line["what"], line["of"]) for line in lines] == [(0, "rollouts", 4), (1, "rollouts", 4)]
    assert [line["why"][cause] / 4 for line in lines] == shares
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)
    table = made._logs["extra"][LOST]
    scored = made._logs["rewards"]["late_for"]
    assert [cause is None for cause in table] == [value == value for value in scored] and None in table


def test_what_a_world_of_one_turn_loses_is_noted_with_its_tokens_and_its_price(tmp_path: Path) -> None:
    def world(rows: Any, texts: Any) -> Columns:
        gone = [i % 4 == 1 for i in range(len(texts))]
        return {
            LOST: ["HTTP 500" if lost else None for lost in gone],
            "cost": [0.25 if lost else 1.0 for lost in gone],
        }

    args = config(tmp_path, objective="grpo", max_steps=1, max_lost_share=0.9)
    args.per_device_train_batch_size = 4
    made = trainer(args, world=world, rollout_func=scripted, train_dataset=dataset(8))
    made.train()
    [line] = noted(tmp_path)
    assert (line["why"], line["of"], line["usd"]) == ({"HTTP 500": 1}, 4, 0.25)
    assert line["tokens"] == len(script(made._logs["prompt"][1][-1]["content"], 1))
