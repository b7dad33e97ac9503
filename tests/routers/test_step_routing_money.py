"""The money of a run: the estimate by hand, the line of a phase, and books that survive the process."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import step_helpers as steps

ROOT = Path(__file__).resolve().parents[2]

from scripted import Scripted

from routers.data.catalogue import Member
from routers.environments.alfworld.environment import AlfWorld
from routers.environments.alfworld.generate import generated
from routers.environments.protocol import Session
from routers.environments.react import ReActExecutor
from routers.environments.scripted import Explorer
from routers.pool import Ledger, Pool, Spending, live_pool
from routers.pool.endpoint import TEMPLATE_TOKENS
from routers.tasks.step_routing.player import PhaseStopped
from routers.tasks.step_routing.spending import Money, Phase, call_usd, estimate, phases, report, spent_between
from routers.tasks.step_routing.world import StepWorld
from srpo import SRPOConfig

CATALOGUE = """members:
  - {name: a, descriptor: x, price_in: 1, price_out: 2, base_url: "http://127.0.0.1:9/v1", max_tokens: 100}
  - {name: b, descriptor: x, price_in: 10, price_out: 20, base_url: "http://127.0.0.1:9/v1", max_tokens: 100}
"""


def task(folder: Path, **fields: Any) -> StepWorld:
    (folder / "catalogue.yaml").write_text(CATALOGUE)
    settings = {"heldout_tasks": ["generated/test"], "step_limit": 10}
    return steps.world(3, 2, executors=["a", "b"], catalogue=str(folder / "catalogue.yaml"), **{**settings, **fields})


def test_calls_of_every_phase_by_hand(tmp_path: Path) -> None:
    args = SRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=5, num_generations=4,
        use_cpu=True, bf16=False, report_to="none", objective="bopo",
    )  # fmt: skip
    made = task(tmp_path, train_caps=[1.0, 2.0], heldout_caps=[float("inf"), 2.0, 3.0], profile_runs=4)
    assert phases(made, args, 7, processes=2) == [
        Phase("profiling", 3 * 4 * 10, 3 * 4 * 10, 0),
        Phase("profiling of held-out tasks", 2 * 4 * 10, 2 * 4 * 10, 0),
        Phase("demonstrations", 0, 0, 3 * 2 * 7 * 10),
        Phase("evaluation of start", 0, 0, 3 * 2 * 10),
        Phase("training", 0, 0, 5 * (4 * 2 * 2) * 10),
        Phase("evaluation of bopo", 0, 0, 3 * 2 * 10),
        # small, large, random 0.1 and 0.3, first-large 2 and 3, cascade 3 and 6, escalate, explore
        Phase("rules", 0, 0, 10 * 2 * 10),
    ]
    text = estimate(made, [Phase("x", 2, 3, 1)], 5.0)
    one = [line.split("|") for line in text.splitlines() if line.startswith(("| x ", "| all "))]
    assert [cell.strip() for cell in one[0][2:5]] == ["2", "3", "1"] and one[0][5:] == one[1][5:]
    assert "max_cost_usd stops at $5" in text and "set max_cost_usd" in estimate(made, [Phase("x", 2, 3, 1)], None)


def test_what_a_call_costs_at_most_by_hand() -> None:
    """A byte is a token; prompts of n steps hold n observations as long as the first, and a line for each action."""
    member = Member("m", "x", 1.0, 2.0, base_url="http://127.0.0.1:9/v1", max_tokens=100)
    executor = ReActExecutor(live_pool({"m": member}, agent_prompt="{query}"), "m")
    session = Session(AlfWorld(generated("generated/train/0")), "s")
    first = len(session.start().encode())
    prompt = len(executor.query(session.view).encode())
    low, high = call_usd(executor, session.view, 3)
    assert low == pytest.approx((TEMPLATE_TOKENS + prompt + 2 * 100) / 1e6)
    step = len("\n> \n") + first
    assert high == pytest.approx(low + (0 + step + 2 * step) / 3 / 1e6)
    assert call_usd(Explorer(), session.view, 3) == (0.0, 0.0)


def test_the_line_of_a_phase() -> None:
    before = {"a": Spending(calls=3, cost=0.5), "b": Spending(calls=1, cost=0.25)}
    after = {"a": Spending(calls=1203, failed=2, cached=7, cost=1.75), "b": before["b"], "c": Spending(cached=4)}
    used = spent_between(before, after)
    assert list(used) == ["a", "c"] and used["a"] == Spending(calls=1200, failed=2, cached=7, cost=1.25)
    line = "profiling: a 1,200 calls (2 failed), 7 from the cache, $1.2500; c 0 calls, 4 from the cache, $0.0000"
    assert report("profiling", used, 2.0, 5.0) == f"{line}. The run has spent $2.0000 of $5"
    assert report("rules", {}, 2.0, None) == "rules: no calls. The run has spent $2.0000"


def pool() -> Pool:
    return Pool({"m": Member("m", "x", 1e4, 1e4)}, {"m": Scripted()}, ledger=Ledger())  # 0.15 a call


def ask(made: Pool) -> str | None:
    return asyncio.run(made.ask("m", "q", 5.0)).error


def test_books_survive_the_process_and_the_cap_counts_all_of_them(tmp_path: Path, capsys: Any) -> None:
    path, first = tmp_path / "spending.json", pool()
    money = Money(first, 0.5, path)
    with pytest.raises(KeyboardInterrupt), money.phase("profiling"):
        assert ask(first) is None and ask(first) is None
        raise KeyboardInterrupt
    assert capsys.readouterr().out == "profiling: m 2 calls, $0.3000. The run has spent $0.3000 of $0.5\n"
    second = pool()
    money = Money(second, 0.5, path)
    with money.phase("profiling"):
        assert ask(second) is None and "over budget" in str(ask(second))  # 0.45; another 0.15 would pass the cap
    assert "m 2 calls (1 failed), $0.1500. The run has spent $0.4500 of $0.5" in capsys.readouterr().out
    with pytest.raises(PhaseStopped, match=r"\$0\.4500 are spent\. All is kept"):
        money.check("All is kept.")
    third = pool()
    Money(third, 9.0, path).check("")
    assert third.ledger.spent_usd == pytest.approx(0.45) and not third.ledger.exhausted and ask(third) is None
    assert json.loads(path.read_text())["members"]["m"]["calls"] == 4


def test_scripted_executors_have_no_money(tmp_path: Path, capsys: Any) -> None:
    money = Money(None, 0.0, tmp_path / "x.json")
    with money.phase("profiling"):
        pass
    money.share()
    money.take_back()
    money.check("")
    assert capsys.readouterr().out == "" and not (tmp_path / "x.json").exists()
