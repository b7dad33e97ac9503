"""A real, tiny router of agent steps: random weights, a tokenizer of the games' words, and its settings."""

from collections.abc import Sequence
from typing import Any

from routers.environments.protocol import View
from routers.environments.registry import benchmark
from routers.environments.scripted import SCRIPTED
from routers.tasks.step_routing.arguments import StepRoutingArguments
from routers.tasks.step_routing.budget import Budget
from routers.tasks.step_routing.environment import CAP, TASK, StepRoutingEnvironment
from routers.tasks.step_routing.player import Driven, Job
from routers.tasks.step_routing.player import drive as drive_all
from routers.tasks.step_routing.prompts import OBSERVATIONS
from routers.tasks.step_routing.settings import StepSettings
from routers.tasks.step_routing.world import StepWorld
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.loop import Limits, play
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.special_tokens import end_ids
from srpo.types import Trajectory

LABELS = ("<small>", "<large>")
GAMES = list(benchmark("alfworld").tasks("generated/test", 6))


def settings(
    observation: str = "verbose", executors: tuple[str, ...] = ("explorer", "planner"), **changes: Any
) -> StepSettings:
    given = {
        "labels": LABELS,
        "environment": "alfworld",
        "step_limit": 12,
        "observation_tokens": 80,
        "policy_price": (1.0, 2.0),
    }
    return StepSettings(executors, observation=observation, **{**given, **changes})


def world(train_limit: int | None = None, heldout_limit: int | None = None, **fields: Any) -> StepWorld:
    """What a recipe with these lines names."""
    return StepWorld(StepRoutingArguments(**fields), train_limit, heldout_limit)


def drive(environment: StepRoutingEnvironment, row: Any, seed: str, choose: Any) -> Driven:
    """One episode by a rule; it must not be lost."""
    [driven] = drive_all(environment, [Job("", row, seed, choose)])
    assert driven.stop != "lost", driven.columns["lost"]
    return driven


def policy(texts: Sequence[str] = ()) -> tuple[Any, Any]:
    """(model, tokenizer): its choices are close to a coin's, which reaches every branch.

    Args:
        texts: what the tokenizer learns, besides the words of prompts; none: ALFWorld's.
    """
    from srpo.scratch_lm import tiny_causal_lm, train_tokenizer

    words = dict.fromkeys(word for style in OBSERVATIONS.values() for word in style.words)
    games = [] if texts else [benchmark("alfworld").make(game, 12).reset() for game in GAMES]
    known = texts or [*games, "You do not act yourself. acted [steps left 3]"]
    tokenizer = train_tokenizer(known, 700, [*LABELS, *words])
    return tiny_causal_lm(tokenizer, hidden=48, layers=2, heads=2, intermediate=64, seed=1).eval(), tokenizer


def executors() -> list[Any]:
    return [SCRIPTED["explorer"](0.0001), SCRIPTED["planner"](0.0024)]


def rollout(
    model: Any,
    tokenizer: Any,
    how: StepSettings,
    games: Sequence[str],
    cap: float | None,
    temperature: float = 1.0,
    members: Sequence[Any] = (),
) -> list[Trajectory]:
    """The same episodes as training plays them; the seed of an episode is its game.

    Args:
        members: executors; none: ALFWorld's.
    """
    environment = StepRoutingEnvironment(
        lambda row: benchmark(how.environment).make(row[TASK], how.step_limit),
        members or executors(),
        how.style.describe,
        Budget(None, how.unit, how.tail_calls, how.on_empty),  # type: ignore[arg-type]
        how.labels,
    )
    rows = [{TASK: game, CAP: cap} for game in games]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": how.style.prompt(environment.starts(row, [cap])[0], environment.labels)}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for row in rows
    ]
    generator = TransformersGenerator(model, tokenizer, Sampling(temperature), eos_ids=end_ids(model, tokenizer))
    limits = Limits(how.step_limit, 100_000, how.observation_tokens, step_seconds=60.0)
    return play(environment, rows, prompts, list(games), generator, tokenizer, limits)


def ids_of(trajectory: Trajectory) -> tuple[int, ...]:
    """All that the policy read and wrote, as far as its last decision."""
    return (*trajectory.prompt_ids, *(i for turn in trajectory.turns for i in turn.ids))


class Corridor:
    """A world that is not ALFWorld's: won after `length` steps forward; says whatever it is told to say."""

    task, task_type, how, seed = "walk to the door", "walk", "one or two", "corridor"
    admissible: tuple[str, ...] = ()
    waits = False

    def __init__(self, length: int = 6, limit: int = 12, says: str = "you walk", fault: str = "") -> None:
        self.length, self.limit, self.says, self.fault = length, limit, says, fault
        self.steps = self.at = 0

    won = property(lambda self: self.at >= self.length)
    score = property(lambda self: min(1.0, self.at / self.length))
    done = property(lambda self: self.won or self.steps >= self.limit)

    def reset(self) -> str:
        if self.fault == "reset":
            raise OSError("no such corridor")
        return f"a corridor. {self.says}"

    def step(self, action: str) -> tuple[str, bool]:
        if self.fault == "step" and self.steps == 2:
            raise OSError("the floor is gone")
        self.steps += 1
        self.at += {"one": 1, "two": 2}.get(action, 0)
        return f"at {self.at}. {self.says}", self.done


class Walker:
    """An executor of the corridor with a bound and a true price; `fault`: raise, hang, error."""

    def __init__(self, name: str, bound: float, action: str, usd: float | None = None, fault: str = "") -> None:
        self.name, self.most, self.action, self.usd, self.fault = name, bound, action, usd, fault
        self.calls = 0

    def bound(self, view: View) -> float:
        return self.most

    async def act(self, view: View, deadline: float) -> Any:
        import asyncio

        from routers.environments.protocol import Act
        from srpo.types import Reply

        self.calls += 1
        if self.fault == "raise":
            raise ConnectionError("gone")
        if self.fault == "hang":
            await asyncio.sleep(60)
        usd = self.most if self.usd is None else self.usd
        error = "timeout: slow" if self.fault == "error" else None
        return Act("" if error else self.action, usd, Reply(self.action, error=error))
