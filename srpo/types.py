"""Words that every package of this distribution shares. Frozen data, names and protocols; no logic.

Columns
    The world (a pool, an environment) answers a batch of completions with *columns*: one list per name, one value per
    completion. Every column is handed to the reward functions by keyword and written to the completions table. The
    trainer itself reads only the names below.

Episodes
    A completion of one turn needs a `World`. Where policy and world take turns, an `Environment` makes one `Episode`
    per completion, and the rollout loop (`srpo.rollout.loop`) plays it: the policy writes, the episode answers, until
    one of `STOPS` ends it. What the policy wrote and what the world answered are `Turn`s of a `Trajectory`, told apart
    by their owner: only the policy's tokens are ever parsed, scored or trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

ROUTE = "route"
"""Member that the completion chose; None where it holds no valid action."""
COST = "cost"
"""What the completion cost, in USD: every call of the pool, failed ones too."""
CORRECT = "correct"
"""Quality of the final answer in [0, 1]; None where it could not be graded."""
FEEDBACK = "feedback"
"""What went wrong, in words, for the self-teacher; "" where there is nothing to say."""
LOST = "lost"
"""Why a completion was lost to the world (a member that never answered, ...); None where it was not.

A lost completion is not scored: it leaves its group, whose mean is the mean of the others."""
STOP = "stop"
"""Which of `STOPS` ended the trajectory."""


class Stopped(RuntimeError):
    """A run ends as it was asked to, or cannot go on; what it has finished is kept."""

    code = 1
    """Exit code of `srpo.cli`."""


Row = Mapping[str, Any]
"""One dataset row: a `prompt` (string or chat messages) and whatever else the world needs to find the query again."""

Columns = dict[str, list[Any]]

World = Callable[[Sequence[Row], Sequence[str]], Columns]
"""(rows, completion texts) -> columns, each as long as the batch."""

Stop = Literal["done", "turns", "tokens", "deadline", "budget", "lost"]
STOPS: tuple[Stop, ...] = ("done", "turns", "tokens", "deadline", "budget", "lost")
"""done: the policy ended it (an answer, a won game). turns, tokens, deadline, budget: that limit was reached.
lost: the world failed; the reason is in the column `LOST`."""


@dataclass(frozen=True)
class Turn:
    """Tokens that one side wrote. `logprobs` (nats) and `choices` exist for the policy's turns only."""

    owner: Literal["policy", "world"]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    """Of each token as a trainer scores it, at the sampling temperature; renormalised over `choices` where there are
    some."""
    choices: tuple[int, ...] | None = None
    """Token ids that were allowed; the turn is then one token. None: any text."""


@dataclass(frozen=True)
class Trajectory:
    """One completion: the turns after the prompt, why it ended, and what the world says about it."""

    prompt_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    stop: Stop
    columns: Mapping[str, Any] = field(default_factory=dict)
    said: "tuple[tuple[str, Observation], ...]" = ()
    """Per turn that the world answered: what was decided, in words, and the answer."""


@dataclass(frozen=True)
class Observation:
    """What an episode answers to one turn of the policy.

    `before` and `after` are the library's own frame and are encoded as they are, control tokens included. `body` is
    text of others: it is encoded without any control or added token, cut to the rollout's limit, and then framed.
    """

    body: str = ""
    before: str = ""
    after: str = ""
    end: Stop | None = None
    """The episode is over, and why; the texts are then not shown to anybody."""
    aside: str = ""
    between: str = ""


class Episode(Protocol):
    """The world of one completion. Single use; the rollout calls it in this order: (choices, step)*, columns."""

    def choices(self) -> Sequence[str] | None:
        """Texts that the next turn is restricted to, each one token of the policy; None: free text."""

    async def step(self, text: str) -> Observation:
        """Answer one turn of the policy (special tokens removed). An exception loses this episode, not the run.

        Steps of all episodes run in one thread, and the policy writes in another meanwhile.
        """

    def columns(self, stop: Stop) -> Mapping[str, Any]:
        """What the rewards need; called once, after the end. The same keys for every episode of an environment."""


class Environment(Protocol):
    """Makes episodes. Its state (a ledger, budgets) is saved with every checkpoint.

    Optional attributes:
        waits: True where it has to wait for others when an episode begins: `episode` is then called in threads, for
            many at once.
        whole_turns: True where nothing but the policy's end token ends a turn: one that a limit cut ends the episode
            ("tokens"), for the world could not tell that it is unfinished.
        tools: schemas of functions that the chat template is given with every prompt, as `apply_chat_template` takes
            them.
    """

    def episode(self, row: Row, seed: str) -> Episode:
        """A fresh episode of a dataset row; the same row and seed give the same world."""

    def metrics(self) -> Mapping[str, float]:
        """Numbers to log since the last call; per rank, averaged over ranks."""

    def spent_usd(self) -> float:
        """Dollars spent since the run began, on this rank. Asked in another thread than that of the steps."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one call, all attempts added up."""

    prompt_tokens: int = 0
    """All of them, cached ones too."""
    completion_tokens: int = 0
    """All of them, reasoning too."""
    cached_tokens: int = 0
    """Of the prompt tokens, those that the provider read from its cache."""
    cache_write_tokens: int = 0
    """Of the prompt tokens, those that it wrote there."""
    reasoning_tokens: int = 0
    """Of the completion tokens."""
    usd: float | None = None
    """What the source of a reply states that it cost; None: its tokens are priced."""
    cache_write_1h_tokens: int = 0
    """Of the tokens written, those to be kept for an hour or longer."""
    cache_token_hours: float = 0.0
    """Tokens that the provider keeps, times the hours that this call pays for."""
    calls: "tuple[Usage, ...]" = field(default=(), compare=False, repr=False)
    """The single requests that this is the sum of; empty: it is one."""


@dataclass(frozen=True)
class Reply:
    """What a pool member answered. `error` is None exactly when there is an answer; failed calls may cost too."""

    text: str
    usage: Usage = Usage()
    cost: float = 0.0
    """USD of this call, all attempts; 0 for a reply out of the cache."""
    error: str | None = None
    seconds: float = 0.0
    cached: bool = False
    reasoning: str = ""
    """What the member thought aloud before `text`; also where it came to no answer."""
