"""What a router of agent steps was trained with besides its weights: executors, prompt, budget. Saved beside it.

One owner for training, evaluation and use: whoever has the checkpoint tells it an episode as it was told in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml

from routers.data.billing import token_usd
from routers.environments.protocol import AgentEnvironment
from routers.tasks.step_routing.budget import Budget
from routers.tasks.step_routing.environment import Situation
from routers.tasks.step_routing.prompts import OBSERVATIONS, Style
from srpo.ranges import Ranges, at_least, check_numbers
from srpo.redact import redacted
from srpo.rollout.untrusted import without_control_tokens
from srpo.strict_yaml import YamlError, read_yaml

STEP_ROUTER = "step_router.yaml"


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
    observation: str = "verbose"
    """What the policy is told: a name of `routers.tasks.step_routing.prompts.OBSERVATIONS`."""
    unit: str = "large_calls"
    """Of the caps that the policy saw: usd, or large_calls."""
    tail_calls: int = 0
    on_empty: str = "stop"
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

    def budget(self, cap: float | None, unit: str | None = None) -> Budget:
        """The limit of one episode; `unit` None: the trained one."""
        return Budget(cap, unit or self.unit, self.tail_calls, self.on_empty)  # type: ignore[arg-type]

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

    def cleaned(self, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[dict[str, str]]:
        """A finished prompt, with the control tokens broken that texts of others spell out; our own words stay."""
        clean = without_control_tokens(tokenizer, keep={*self.labels, *self.style.words})
        return [{**message, "content": clean(message["content"])} for message in messages]

    def prompt_ids(self, messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
        """Tokens of a finished prompt, cleaned."""
        ids: list[int] = tokenizer.apply_chat_template(
            self.cleaned(messages, tokenizer),
            add_generation_prompt=True,
            return_dict=False,
            **self.chat_template_kwargs,
        )
        return ids

    def policy_usd(self, read: int, written: int) -> float:
        """USD of tokens that the policy read, each of a context once (it is cached), and wrote."""
        return float(token_usd(read, written, *self.policy_price))

    def save(self, folder: str | Path) -> None:
        """Write `step_router.yaml` into a checkpoint's folder."""
        document = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        document["chat_template_kwargs"] = redacted(self.chat_template_kwargs)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        Path(folder, STEP_ROUTER).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> StepSettings:
        """Read `step_router.yaml` of a folder.

        Raises:
            ValueError: names the file and what cannot be read.
        """
        path = Path(folder, STEP_ROUTER)
        if not path.is_file():
            raise ValueError(
                f"there is no {path}, which scripts/train_bopo.py writes: say how the policy was trained with "
                "StepRouter.from_pretrained(..., settings=StepSettings(...))"
            )
        try:
            document = read_yaml(path)
            for name in ("executors", "labels", "policy_price"):
                if name in document:
                    document[name] = tuple(document[name])
            return cls(**document)
        except YamlError:
            raise  # names the file already
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
