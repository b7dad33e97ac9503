"""Steps that wait for another process: they hold up nobody, change nothing, and one that hangs costs its episode."""

import asyncio
import threading
import time
from typing import Any

import pytest
import step_helpers as steps
from test_step_routing_episode import LARGE, SMALL, Corridor, describe

from routers.environments.protocol import GameError
from routers.tasks.step_routing.environment import StepRoutingEnvironment
from routers.tasks.step_routing.player import Job, drive
from routers.tasks.step_routing.router import StepRouter
from routers.tasks.step_routing.rules import random_mix
from srpo.rollout.worker_loop import EpisodeLoop

MANY = 16
SLEEP = 0.2


class Slow(Corridor):
    """A step takes `seconds`; its second one takes until `free` where it hangs."""

    waits = True

    def __init__(self, length: int, seconds: float = SLEEP, hangs: threading.Event | None = None, **more: Any) -> None:
        super().__init__(length, **more)
        self.seconds, self.hangs = seconds, hangs
        self.threads: set[str] = set()

    def step(self, action: str) -> tuple[str, bool]:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.hangs is not None and self.steps == 1:
            self.hangs.wait()
        return super().step(action)


class Quick(Slow):
    waits = False


def played(worlds: list[Slow], seconds: float = 60.0) -> tuple[list[Any], StepRoutingEnvironment, list[Any]]:
    """All at once, on the loop of rollouts; the results, and what was played."""
    environment = StepRoutingEnvironment(lambda row: worlds[row["n"]], [SMALL, LARGE], describe, labels=["<s>", "<l>"])
    episodes, make = list[Any](), environment.episode

    def kept(row: Any, seed: str) -> Any:
        episodes.append(make(row, seed))
        return episodes[-1]

    environment.episode = kept  # type: ignore[method-assign, assignment]
    jobs = [Job(f"{n}", {"n": n}, f"seed {n}", random_mix(0.5)) for n in range(len(worlds))]
    return drive(environment, jobs, seconds=seconds), environment, episodes


def test_sixteen_wait_as_long_as_one_and_play_the_same() -> None:
    started = time.monotonic()
    worlds = [Slow(4) for _ in range(MANY)]
    threaded, environment, _ = played(worlds)
    seconds = time.monotonic() - started
    plain, other, _ = played([Quick(4, 0.0) for _ in range(MANY)])
    assert threaded == plain and len({str(driven.decisions) for driven in plain}) > 3
    assert environment.metrics() == pytest.approx(other.metrics())
    assert environment.spent_usd() == pytest.approx(other.spent_usd())
    rounds = max(len(driven.decisions) for driven in plain)
    assert rounds * SLEEP <= seconds < 3 * rounds * SLEEP  # one after the other: 16 times
    assert all(world.threads == {"environment-step"} for world in worlds)


def test_a_step_that_computes_stays_in_its_thread() -> None:
    world = Quick(2, 0.0)
    played([world])
    assert world.threads == {"srpo-episodes"}


def test_a_step_that_hangs_costs_its_episode_and_no_other_step_follows_it() -> None:
    free = threading.Event()
    worlds = [Slow(4, 0.05, free if n == 3 else None) for n in range(8)]
    started = time.monotonic()
    ends, _, episodes = played(worlds, seconds=2.0)
    assert time.monotonic() - started < 8
    assert [n for n, end in enumerate(ends) if end.stop == "lost"] == [3]
    assert ends[3].columns["lost"] == "no answer within 2 s"
    plain, _, _ = played([Quick(4, 0.0) for n in range(8)])
    assert [end for n, end in enumerate(ends) if n != 3] == [end for n, end in enumerate(plain) if n != 3]

    left = episodes[3]
    for _ in range(2):  # while the step is at work, and after it has come to its end
        with EpisodeLoop() as loop:
            [again] = loop.run([lambda: left.step("<s>")], 5.0)
        assert "the episode cannot go on" in again.cause and "GameError" in again.cause
        free.set()
        deadline = time.monotonic() + 5
        while worlds[3].steps < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert worlds[3].steps == 2, "the one step that was left behind, and none behind it"


@pytest.mark.parametrize("kind", [Slow, Quick])
def test_what_a_step_raises_is_told_and_ends_the_episode(kind: type[Slow]) -> None:
    environment = StepRoutingEnvironment(lambda row: kind(4, 0.0, fault="step"), [SMALL, LARGE], describe)
    broken = environment.episode({}, "s")
    with pytest.raises(OSError, match="the floor is gone"):
        asyncio.run(broken.step("small"))
    with pytest.raises(GameError, match="corridor/4: a step failed or was left behind"):
        asyncio.run(broken.step("small"))


def test_no_exception_is_swallowed() -> None:
    class Odd(Slow):
        def step(self, action: str) -> tuple[str, bool]:
            return next(iter(()))

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(
            StepRoutingEnvironment(lambda row: Odd(4), [SMALL, LARGE], describe).episode({}, "s").step("small")
        )


class SlowWorld(steps.Corridor):
    waits = True

    def step(self, action: str) -> tuple[str, bool]:
        time.sleep(SLEEP)
        if self.fault == "hang" and self.steps == 1:
            time.sleep(30)
        return super().step(action)


def test_a_router_of_steps_plays_them_at_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routers.tasks.step_routing.router.GRACE_SECONDS", 0.0)
    executors = [steps.Walker("explorer", 0.0001, "one"), steps.Walker("planner", 0.0024, "two")]
    with StepRouter(*steps.policy(), steps.settings("progress"), call_seconds=4.0) as router:

        def play(make: Any) -> list[Any]:
            return [f.result() for f in [router.submit(make(n), executors, seed=f"{n}") for n in range(MANY)]]

        plain = play(lambda n: steps.Corridor(6))
        started = time.monotonic()
        slow = play(lambda n: SlowWorld(6, fault="hang" if n == 5 else ""))
        seconds = time.monotonic() - started
    assert [p.ids for n, p in enumerate(slow) if n != 5] == [p.ids for n, p in enumerate(plain) if n != 5]
    assert [p.score for n, p in enumerate(slow) if n != 5] == [1.0] * (MANY - 1)
    assert slow[5].stop == "lost" and "no answer within 4 s" in slow[5].error
    assert seconds < 4.0 + 2 * SLEEP + 2.0
