"""What a router of agent steps was trained with besides its weights: executors, prompt, budget. Saved beside it.

One owner for training, evaluation and use: whoever has the checkpoint tells it an episode as it was told in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

from routers.data.billing import token_usd
from routers.environments.protocol import AgentEnvironment
from routers.router import plain_settings, read_router, write_router
from routers.tasks.step_routing.arguments import Observations, OnEmpty, Unit
from routers.tasks.step_routing.budget import Budget
from routers.tasks.step_routing.environment import Situation
from routers.tasks.step_routing.prompts import OBSERVATIONS, Style
from srpo.ranges import Ranges, at_least, check_numbers
from srpo.texts import without_control_tokens

KIND = "step_routing"


@dataclass(frozen=True)
class Told:
    """What a prompt may read of an environment, where it is told instead of played. Texts as in `AgentEnvironment`."""

    task: str
    task_type: str = ""
    score: float = 0.0
    seed: str = "told"
    admissible: tuple[str, ...] = ()
    how: str = ""


@dataclass(frozen=True)
class StepSettings:
    """How an episode becomes tokens, and what limits it.

    Raises:
        ValueError: an unknown kind of observation or budget, labels that are not one per executor, a number out of
            its range.
    """

    RANGES: ClassVar[Ranges] = {
        "tail_calls": at_least(0),
        "step_limit": at_least(1),
        "observation_tokens": at_least(0),
        "temperature": at_least(0),
        "policy_price": at_least(0),
    }

    executors: tuple[str, ...]
    """Names, the cheapest first; every further one counts as expensive."""
    labels: tuple[str, ...]
    """The policy's words for them, one token each."""
    observation: Observations = "verbose"
    """What the policy is told: a name of `routers.tasks.step_routing.prompts.OBSERVATIONS`."""
    unit: Unit = "large_calls"
    """Of the caps that the policy saw: usd, or large_calls."""
    tail_calls: int = 0
    on_empty: OnEmpty = "stop"
    """Both as in `routers.tasks.step_routing.budget.Budget`."""
    step_limit: int = 20
    observation_tokens: int = 600
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    environment: str = ""
    """Where it was trained: a name of `routers.environments.registry`."""
    temperature: float = 1.0
    """Of the policy, in training."""
    policy_price: tuple[float, float] = (0.0, 0.0)
    """USD per million tokens that the policy reads and writes."""

    def __post_init__(self) -> None:
        names, labels = self.executors, self.labels
        if len(names) < 2 or not len(names) == len(set(names)) == len(labels) == len(set(labels)):
            raise ValueError(f"executors {names} with labels {labels}: two or more, one label each, all different")
        if self.observation not in OBSERVATIONS:
            raise ValueError(f"observation {self.observation!r} is unknown; use one of {', '.join(OBSERVATIONS)}")
        check_numbers(self)
        self.budget(None)

    def budget(self, cap: float | None, unit: Unit | None = None) -> Budget:
        """The limit of one episode; `unit` None: the trained one.

        Raises:
            ValueError: as `Budget`.
        """
        return Budget(cap, unit or self.unit, self.tail_calls, self.on_empty)

    @property
    def style(self) -> Style:
        return OBSERVATIONS[self.observation]

    @property
    def names(self) -> dict[str, str]:
        """Executor -> label."""
        return dict(zip(self.executors, self.labels, strict=True))

    def messages(self, start: Situation, clean: Callable[[str], str] = lambda text: text) -> list[dict[str, str]]:
        """The policy's prompt, from the situation before the first decision; `clean` for texts of others."""
        view, world = start.view, start.view.environment
        told = Told(clean(world.task), clean(world.task_type), world.score, view.seed)
        view = replace(view, first=clean(view.first), environment=cast(AgentEnvironment, told))
        return [{"role": "user", "content": self.style.prompt(replace(start, view=view), self.names)}]

    def start_ids(self, start: Situation, tokenizer: Any, clean: Callable[[str], str]) -> list[int]:
        """Tokens of the prompt, from the situation before the first decision."""
        return self._templated(self.messages(start, clean), tokenizer)

    def cleaned(self, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[dict[str, str]]:
        """A finished prompt, with the control tokens broken that texts of others spell out; our own words stay."""
        clean = without_control_tokens(tokenizer, keep={*self.labels, *self.style.words})
        return [{**message, "content": clean(message["content"])} for message in messages]

    def prompt_ids(self, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
        """Tokens of a finished prompt, cleaned."""
        return self._templated(self.cleaned(messages, tokenizer), tokenizer)

    def _templated(self, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
        kwargs = self.chat_template_kwargs
        ids: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **kwargs
        )
        return ids

    def policy_usd(self, read: int, written: int) -> float:
        """USD of tokens that the policy read, each of a context once (it is cached), and wrote."""
        return float(token_usd(read, written, *self.policy_price))

    def save(self, folder: str | Path, made_from: Mapping[str, Any] | None = None) -> None:
        """Write `router.yaml` into a checkpoint's folder."""
        write_router(folder, KIND, plain_settings(self), made_from)

    @classmethod
    def load(cls, folder: str | Path) -> StepSettings:
        """Read `router.yaml` of a folder or Hub repository.

        Raises:
            ValueError: names the file and what cannot be read.
        """
        file = read_router(folder)
        if file.kind != KIND:
            raise ValueError(f"{file.path} is of a router of kind {file.kind}, not {KIND}")
        return file.settings_of(cls)
