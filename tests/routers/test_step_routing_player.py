"""Playing by rules: many at once as one by one, and what a fault costs: an episode, not the run."""

import asyncio
import functools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import step_helpers as steps
from test_step_routing_episode import LARGE, SMALL, Corridor, Walker, describe

ROOT = Path(__file__).resolve().parents[2]


from scripted import Fault, Scripted

from routers.data.catalogue import Member
from routers.environments import registry
from routers.environments.protocol import Act
from routers.environments.react import ReActExecutor
from routers.pool import Ledger, Pool, Retry
from routers.tasks.step_routing.environment import TASK, StepRoutingEnvironment
from routers.tasks.step_routing.player import Driven, Job, PhaseStopped, Player, play_jobs
from routers.tasks.step_routing.profiles import profile_tasks
from routers.tasks.step_routing.rules import always_large, always_small, random_mix
from srpo.types import CORRECT, COST, LOST


class Waiting(Walker):
    """Answers after a while; knows how many wait at once."""

    now = most = 0

    async def act(self, view: Any, deadline: float) -> Act:
        Waiting.now += 1
        Waiting.most = max(Waiting.most, Waiting.now)
        await asyncio.sleep(0.02)
        Waiting.now -= 1
        return await super().act(view, deadline)


class Trapped(Corridor):
    """Its second step hangs, in a call that cannot be interrupted; made several times, it is free of that."""

    waits = True
    made: ClassVar[list[str]] = []

    def __init__(self, length: int, heals: bool) -> None:
        super().__init__(length)
        self.trapped = not heals or self.seed not in Trapped.made
        Trapped.made.append(self.seed)

    def step(self, action: str) -> tuple[str, bool]:
        if self.trapped and self.steps == 1:
            threading.Event().wait(3)
        return super().step(action)


def make(row: Any) -> Corridor:
    fault, length = row.get("fault", ""), row["length"]
    if fault.startswith("hang"):
        return Trapped(length, heals=fault == "hang once")
    return Corridor(length, fault=fault)


def environment(small: Any = SMALL, large: Any = LARGE, **more: Any) -> StepRoutingEnvironment:
    return StepRoutingEnvironment(make, [small, large], describe, **more)


def jobs(*faults: str, length: int = 5) -> list[Job]:
    rows = [{TASK: f"t{n}", "length": length + n % 2, "fault": fault} for n, fault in enumerate(faults)]
    rules = (always_small, always_large, random_mix(0.5))
    return [Job(f"{n}/{k}", row, f"s{n}", rule) for n, row in enumerate(rows) for k, rule in enumerate(rules)]


def played(player: Player, some: Sequence[Job]) -> dict[str, Driven]:
    return {job.key: driven for job, driven in player(some)}


def test_many_at_once_are_what_they_are_one_by_one(tmp_path: Path) -> None:
    some = jobs(*[""] * 12)
    alone = played(Player(environment), some)
    Waiting.most = 0
    slow = functools.partial(environment, Waiting("small", 0.01, "one"), Waiting("large", 0.1, "two"))
    started = time.monotonic()
    together = played(Player(slow, threads=8), some)
    assert together == alone and list(alone) == [job.key for job in some] and len(alone) == 36
    assert Waiting.most == 8
    steps = sum(len(driven.decisions) for driven in alone.values())
    assert time.monotonic() - started < 0.5 * steps * 0.02 + 1  # one by one they would take all of it


def test_profiles_of_processes_threads_and_one_by_one_are_the_same_file(tmp_path: Path) -> None:
    world = steps.world(train_limit=6)
    parts, types = (world.arguments.train_tasks, 6), world.train_tasks()
    make_it = functools.partial(world.environment, parts)
    players = [Player(make_it), Player(make_it, threads=4), Player(make_it, processes=2)]
    paths = [tmp_path / f"{n}.parquet" for n in range(3)]
    found = [profile_tasks(types, player, path, runs=3) for player, path in zip(players, paths, strict=True)]
    assert found[0] == found[1] == found[2]
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()
    assert {score for p in found[0] for score in (*p.scores_small, *p.scores_large)} == {0.0, 1.0}


@pytest.mark.parametrize("threads", [0, 4])
def test_worlds_that_raise_or_hang_cost_their_episodes(threads: int, capsys: Any) -> None:
    Trapped.made.clear()
    some = [job for job in jobs("", "step", "hang", "reset", "hang once", "") if job.key.endswith("/1")]
    started = time.monotonic()
    found = played(Player(environment, threads=threads, seconds=0.3), some)
    assert time.monotonic() - started < 3.0  # three stops of 0.3 s, and nobody waits for the trap to open
    assert {key: (d.stop, d.columns[CORRECT]) for key, d in found.items()} == {
        "0/1": ("done", 1.0), "1/1": ("lost", 0.0), "2/1": ("lost", 0.0), "3/1": ("lost", 0.0),
        "4/1": ("done", 1.0), "5/1": ("done", 1.0),
    }  # fmt: skip
    causes = [found[f"{n}/1"].columns[LOST] for n in (1, 2, 3)]
    assert "the floor is gone" in causes[0] and "no answer" in causes[1] and "no such corridor" in causes[2]
    # the call was made and is paid; a corridor that was never entered cost nothing
    assert [found[f"{n}/1"].columns[COST] for n in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.0])
    assert found["2/1"].decisions == () and capsys.readouterr().out.count("lost twice, counts as failed") == 3


def test_an_executor_that_never_answers_costs_its_episode() -> None:
    class Silent(Walker):
        async def act(self, view: Any, deadline: float) -> Act:
            if view.environment.length == 6:
                await asyncio.Event().wait()
            return await super().act(view, deadline)

    made = functools.partial(environment, SMALL, Silent("large", 0.1, "two"))
    found = played(Player(made, threads=2, seconds=0.2), [j for j in jobs("", "") if j.key.endswith("/1")])
    assert found["0/1"].stop == "done" and found["1/1"].stop == "lost"
    assert found["1/1"].columns[COST] == pytest.approx(0.1)  # it may be billed


def test_a_streak_of_lost_episodes_stops_the_phase_and_nobody_has_failed(tmp_path: Path) -> None:
    faults = ["", "step", "", *["step"] * 10]
    with pytest.raises(PhaseStopped, match=r"the floor is gone.*not counted"):
        play_jobs(jobs(*faults), tmp_path / "x", Player(environment), lambda driven: driven.stop)
    kept = (tmp_path / "x").read_text().split("\n")[:-1]
    assert len(kept) == 9 and kept.count('["1/0", "lost"]') == 1  # the one between two that worked


def test_a_world_that_always_fails_does_not_stop_a_phase_for_ever() -> None:
    assert [d.stop for d in played(Player(environment), jobs("step")).values()] == ["lost"] * 3


def pool_of(backend: Scripted, ledger: Ledger | None = None) -> Pool:
    return Pool({"m": Member("m", "x", 1e4, 1e4)}, {"m": backend}, ledger=ledger, retry=Retry(attempts=1))


def live(pool: Pool) -> StepRoutingEnvironment:
    return environment(large=ReActExecutor(pool, "m"), ledger=pool.ledger)


def test_an_endpoint_that_answers_nobody_is_not_a_failure_of_the_model() -> None:
    pool = pool_of(Scripted(faults=[Fault(error="bad request: status 401: no key", retry=False)] * 999))
    with pytest.raises(PhaseStopped, match="no call was answered: bad request: status 401"):
        played(Player(lambda: live(pool), threads=2), [j for j in jobs("", "") if j.key.endswith("/1")])


def test_an_open_circuit_is_nobodys_failure_and_the_episode_is_played_again() -> None:
    down = Fault(error="circuit open: 10 attempts failed in a row", retry=False)
    pool = pool_of(Scripted("Action: two", faults=[None, down]))
    [driven] = played(Player(lambda: live(pool), threads=1), jobs("")[1:2]).values()
    assert driven.stop == "done" and driven.columns["calls"] == 3  # not four, as with a failed call: see below
    assert driven.columns[COST] == pytest.approx(3 * 0.15) and pool.ledger.spent_usd == pytest.approx(6 * 0.15)


def test_a_single_failed_call_is_a_wasted_step() -> None:
    faults = [None, Fault(error="server error: 500"), None]
    pool = pool_of(Scripted("Action: two", faults=faults))
    [driven] = played(Player(lambda: live(pool)), jobs("")[1:2]).values()
    assert driven.stop == "done" and driven.columns["calls"] == 4  # two, nothing, two, two: 5 are walked
    assert driven.columns[COST] == pytest.approx(3 * 0.15) == pool.ledger.spent_usd


def test_the_cap_stops_a_phase_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    """0.15 a call, three calls an episode of always-large; 1.0 pays for two episodes and never for seven calls."""
    some = [job for job in jobs(*[""] * 6) if job.key.endswith("/1")]
    backend = Scripted("Action: two", seconds=0.01)
    pool = pool_of(backend, Ledger(1.0))
    player = Player(lambda: live(pool), threads=1)
    with pytest.raises(PhaseStopped, match=r"max_cost_usd is reached: \$0\.9000 are spent"):
        play_jobs(some, tmp_path / "x", player, lambda driven: driven.columns[CORRECT])
    assert (tmp_path / "x").read_text() == '["0/1", 1.0]\n["1/1", 1.0]\n' and len(backend.queries) == 6
    pool.ledger.account.cap, pool.ledger.exhausted = 9.0, False
    assert play_jobs(some, tmp_path / "x", player, lambda driven: driven.columns[CORRECT]) == [1.0] * 6
    assert len(backend.queries) == 6 + 4 * 3  # nothing was paid twice


def test_interrupting_a_phase_ends_its_threads() -> None:
    slow = functools.partial(environment, Waiting("small", 0.01, "one"), Waiting("large", 0.1, "two"))
    before = set(threading.enumerate())
    for _ in range(10):  # wherever its threads are just then
        taken = iter(Player(slow, threads=8)(jobs(*[""] * 40)))
        next(taken)
        started = time.monotonic()
        taken.close()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 2
        left = {thread.name for thread in set(threading.enumerate()) - before}
        assert left <= {"tqdm_monitor"}  # of the progress bars, one for good


class BrokenBenchmark:
    """One task that begins at its second attempt, and one that never does."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def tasks(self, which: str, count: int = 0) -> dict[str, str]:
        return {"good": "walk", "shy": "walk", "bad": "walk"}

    def make(self, task: str, limit: int) -> Corridor:
        self.made.append(task)
        broken = task == "bad" or (task == "shy" and self.made.count("shy") == 1)
        return Corridor(3, limit, fault="reset" if broken else "")

    def close(self) -> None: ...


def test_a_task_that_does_not_begin_has_no_row(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(registry.BENCHMARKS, "broken", ("test_step_routing_player:BrokenBenchmark", ""))
    registry.benchmark.cache_clear()
    lines = {"environment": "broken", "observation": "progress", "executors": ["random", "explorer"]}
    world = steps.world(**lines)
    rows = world.rows(world.train_tasks(), [float("inf"), 2.0])
    assert [row["query_id"] for row in rows] == ["good@inf", "shy@inf", "good@2", "shy@2"]
    assert "left out, it does not begin: bad: OSError: no such corridor" in capsys.readouterr().out
    dear = steps.world(**lines, budget_unit="usd", executor_usd=[1.0, 2.0])
    with pytest.raises(ValueError, match="cannot pay for one call"):
        dear.rows(["good"], [0.5])
    registry.benchmark.cache_clear()
