"""`StepRouter` on a real tiny policy: it decides as the rollouts of its training do, and failures stay small."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import step_helpers as steps
from step_helpers import GAMES, Corridor, Walker

from routers import StepRouter
from routers.environments.registry import benchmark
from routers.tasks.step_routing.settings import StepSettings
from srpo.types import CORRECT, COST

SMALL, LARGE = Walker("explorer", 0.01, "one"), Walker("planner", 0.1, "two")


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    return steps.policy()


@pytest.fixture
def threads() -> Iterator[None]:
    """No thread of the router outlives it."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (left := [t for t in set(threading.enumerate()) - before if "srpo" in t.name or "router" in t.name]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not left


def game(name: str, limit: int = 12) -> Any:
    return benchmark("alfworld").make(name, limit)


@pytest.mark.parametrize("observation", ["compact", "progress", "verbose"])
@pytest.mark.parametrize(("unit", "cap"), [("large_calls", None), ("large_calls", 2.0), ("usd", 0.0052)])
def test_an_episode_is_token_for_token_the_rollout_of_training(
    policy: Any, observation: str, unit: str, cap: float | None
) -> None:
    """Same contexts, same masks, same dice, hence the same choices, success and cost."""
    how = steps.settings(observation, unit=unit)
    rolled = steps.rollout(*policy, how, GAMES, cap)
    with StepRouter(*policy, how) as router:
        for name, trajectory in zip(GAMES, rolled, strict=True):
            played = router.play(game(name), steps.executors(), cap, seed=name)
            assert played.ids == steps.ids_of(trajectory)
            assert [step.executor for step in played.steps] == trajectory.columns["members"]
            assert (played.stop, played.score) == (trajectory.stop, trajectory.columns[CORRECT])
            assert played.executor_usd == pytest.approx(trajectory.columns[COST], rel=1e-12) and not played.violated
            masks = [len(t.choices or ()) for t in trajectory.turns if t.owner == "policy"]
            assert [len(step.allowed) for step in played.steps] == masks
            assert [step.probability for step in played.steps] == pytest.approx(
                [2.718281828459045 ** t.logprobs[0] for t in trajectory.turns if t.owner == "policy"], rel=1e-4
            )  # company may change the last bits
            decisions = len(played.steps)  # the policy reads at $1 and writes at $2 per million tokens
            assert played.policy_usd == pytest.approx((len(played.ids) - decisions + 2 * decisions) / 1e6)
            assert played.cost_usd == played.executor_usd + played.policy_usd


def test_steps_say_who_acted_out_of_whom_and_why(policy: Any) -> None:
    """A policy that always wants the planner: .1 a call; the cap of .25 pays for two, then for small ones."""
    with StepRouter(*_always(policy, "<large>"), steps.settings(unit="usd")) as router:
        played = router.play(Corridor(length=99, limit=6), [LARGE, SMALL], 0.25)
    assert [step.executor for step in played.steps] == ["planner"] * 2 + ["explorer"] * 4
    assert [step.allowed for step in played.steps] == [("explorer", "planner")] * 2 + [("explorer",)] * 4
    assert [step.left for step in played.steps] == pytest.approx([0.25, 0.15, 0.05, 0.04, 0.03, 0.02])
    assert [step.usd for step in played.steps] == [0.1, 0.1, 0.01, 0.01, 0.01, 0.01]
    assert played.steps[0].bounds == {"explorer": 0.01, "planner": 0.1} and played.steps[2].probability == 1.0
    assert [step.action for step in played.steps][:3] == ["two", "two", "one"]
    assert [step.observation for step in played.steps] == [f"at {n}. you walk" for n in (2, 4, 5, 6, 7, 8)]
    assert (played.stop, played.score, played.won) == ("turns", pytest.approx(8 / 99), False)


def _always(policy: Any, label: str) -> tuple[Any, Any]:
    """A policy that takes this label wherever it may: its embedding (tied to the output) is made long and constant."""
    import copy

    import torch

    model, tokenizer = copy.deepcopy(policy[0]), policy[1]
    wanted, other = (tokenizer.convert_tokens_to_ids(x) for x in (label, *(set(steps.LABELS) - {label})))
    head = torch.nn.Linear(48, len(tokenizer), bias=True)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    head.bias.data[wanted], head.bias.data[other] = 30.0, 0.0
    model.lm_head = head
    return model.eval(), tokenizer


def test_a_world_that_is_over_early_and_closed_is_not_out_of_turns(policy: Any) -> None:
    """Stuck for good after two steps; from then on nobody may ask it what is possible."""

    class Trap(Corridor):
        done = property(lambda self: self.steps >= 2)  # type: ignore[assignment]

        @property
        def admissible(self) -> tuple[str, ...]:  # type: ignore[override]
            if self.done:
                raise OSError("closed")
            return ()

    with StepRouter(*policy, steps.settings()) as router:
        played = router.play(Trap(length=9), [SMALL, LARGE], 1)
    assert (played.stop, played.won, len(played.steps)) == ("done", False, 2) and played.steps[-1].observation


def test_a_cap_of_the_other_unit_holds_too(policy: Any) -> None:
    with StepRouter(*_always(policy, "<large>"), steps.settings(unit="large_calls")) as router:
        played = router.play(Corridor(length=99, limit=6), [SMALL, LARGE], 0.115, unit="usd")
        assert [step.executor for step in played.steps] == ["planner", "explorer"] and played.stop == "budget"
        assert played.executor_usd == pytest.approx(0.11)
        none = router.play(Corridor(), [SMALL, LARGE], 0.001, unit="usd")
        assert (none.stop, none.steps, none.executor_usd, none.ids) == ("budget", (), 0.0, ())


@pytest.mark.parametrize(("fault", "usd"), [("raise", 0.1), ("hang", 0.1), ("reset", 0.0), ("step", 0.15)])
def test_what_raises_or_hangs_costs_its_episode_and_its_bound(
    policy: Any, threads: None, monkeypatch: pytest.MonkeyPatch, fault: str, usd: float
) -> None:
    """The call may be billed, so all of its bound counts; the episodes beside it end as ever."""
    bad = Walker("planner", 0.1, "two", usd=0.05, fault=fault if fault in ("raise", "hang") else "")
    world = Corridor(length=9, fault=fault if fault in ("reset", "step") else "")
    monkeypatch.setattr("routers.tasks.step_routing.router.GRACE_SECONDS", 1.0)
    with StepRouter(*_always(policy, "<large>"), steps.settings(), call_seconds=0.5) as router:
        others = [router.submit(Corridor(length=9), [SMALL, LARGE]) for _ in range(3)]
        played = router.play(world, [SMALL, bad])
        assert [other.result().stop for other in others] == ["done"] * 3
    assert played.stop == "lost" and played.error and not played.won
    assert played.executor_usd == pytest.approx(usd)  # the floor goes at the third step; .05 each are paid
    if fault in ("raise", "hang"):
        assert played.steps[-1].error == played.error and bad.calls == 1


def test_a_failed_call_costs_its_step_and_its_money(policy: Any) -> None:
    failing = Walker("planner", 0.1, "two", usd=0.03, fault="error")
    with StepRouter(*_always(policy, "<large>"), steps.settings(step_limit=3)) as router:
        played = router.play(Corridor(length=3, limit=3), [SMALL, failing], 1)
    assert [step.error for step in played.steps] == ["timeout: slow", None, None]
    assert played.executor_usd == pytest.approx(0.03 + 0.01 + 0.01) and played.stop == "turns"


def test_many_at_once_share_the_model_and_change_nothing(policy: Any, threads: None) -> None:
    how = steps.settings("compact")

    async def crowd(router: StepRouter) -> list[Any]:
        names = GAMES * 6
        return await asyncio.gather(
            *(router.aplay(game(n), steps.executors(), 2, seed=f"{i}/{n}") for i, n in enumerate(names))
        )

    with StepRouter(*policy, how, max_concurrent=36) as router:
        together = asyncio.run(crowd(router))
        forwards = router._batches._generator.forwards  # type: ignore[attr-defined]
        decisions = sum(len(played.steps) for played in together)
        assert forwards < decisions / 2, "episodes were not decided in batches"
        alone = [router.play(game(n), steps.executors(), 2, seed=f"{i}/{n}") for i, n in enumerate(GAMES * 6)]
    assert [played.ids for played in together] == [played.ids for played in alone]
    assert [played.cost_usd for played in together] == [played.cost_usd for played in alone]


def test_a_checkpoint_is_a_folder_with_its_settings(policy: Any, tmp_path: Path, threads: None) -> None:
    model, tokenizer = policy
    how = steps.settings("progress", chat_template_kwargs={"enable_thinking": False})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no router\.yaml"):
        StepRouter.from_pretrained(tmp_path)
    how.save(tmp_path)
    assert StepSettings.load(tmp_path) == how
    with StepRouter(model, tokenizer, how) as router, StepRouter.from_pretrained(tmp_path) as read:
        assert read.settings == how
        for name in GAMES[:2]:
            a, b = (r.play(game(name), steps.executors(), 1, seed=name) for r in (router, read))
            assert a.ids == b.ids and [s.executor for s in a.steps] == [s.executor for s in b.steps]
    (tmp_path / "router.yaml").write_text("kind: step_routing\nsettings: {executors: [a, b], labels: [a, a]}\n")
    with pytest.raises(ValueError, match=r"router\.yaml: settings: executors .*all different"):
        StepRouter.from_pretrained(tmp_path)


def test_a_lora_adapter_is_a_checkpoint_too(policy: Any, tmp_path: Path) -> None:
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    model, tokenizer = copy.deepcopy(policy[0]), policy[1]
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:  # an adapter starts as nothing
                torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(0))
    how = steps.settings("progress")
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    how.save(tmp_path / "adapter")
    played = {}
    made = {
        "read": StepRouter.from_pretrained(tmp_path / "adapter"),
        "adapted": StepRouter(adapted, tokenizer, how),
        "base": StepRouter(*policy, how),
    }
    for name, router in made.items():
        with router:
            found = [router.play(game(g), steps.executors(), seed=g) for g in GAMES]
        played[name] = [[(s.executor, round(s.probability, 4)) for s in one.steps] for one in found]
    assert played["read"] == played["adapted"] != played["base"]


def test_misuse_is_named(policy: Any) -> None:
    with pytest.raises(ValueError, match=r"'no such word' is \d+ tokens of this tokenizer"):
        StepRouter(*policy, dataclasses.replace(steps.settings(), labels=("<small>", "no such word")))
    with pytest.raises(ValueError, match="observation 'loud' is unknown"):
        steps.settings("loud")
    router = StepRouter(*policy, steps.settings())
    with pytest.raises(ValueError, match="executors are explorer, medium; the policy was trained with explorer, plan"):
        router.play(Corridor(), [SMALL, Walker("medium", 0.1, "two")])
    with pytest.raises(ValueError, match="cap=-1"):
        router.play(Corridor(), [SMALL, LARGE], -1)
    with pytest.raises(ValueError, match=r"a cap of 0\.5: calls of the expensive .* a whole number of them"):
        router.session(cap=0.5, unit="large_calls")
    with pytest.raises(ValueError, match="step_limit is 0"):
        router.session(step_limit=0)
    session = router.session()
    router.close()
    router.close()
    for use in (lambda: router.session(), lambda: session.choose("a corridor")):
        with pytest.raises(RuntimeError, match="closed"):
            use()
