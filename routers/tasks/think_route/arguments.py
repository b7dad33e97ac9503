"""The recipe keys of think/route agents: questions, pool, prompt and reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from routers.evaluation.answers import METRICS
from srpo.ranges import SEED, Ranges, above, at_least, between, check_numbers
from srpo.settings import about, check_choices

POOLS = ("recorded", "endpoint")
REPLIES = ("full", "result")
FAILED = ("lost", "observe")
PROMPTS = ("router_r1", "short")
FORMATS = ("tags", "json")
SCHEMES = ("additive", "router_r1", "xrouter")


@dataclass
class ThinkRouteArguments:
    """The policy thinks, asks members, reads their replies, and answers."""

    RANGES: ClassVar[Ranges] = {
        "question_seed": SEED,
        "call_seconds": above(0),
        "cost_weight": at_least(0),  # each reward scheme has an upper end of its own
        "cost_weights": between(0, 1),
        "format_weight": at_least(0),
        "cost_scale_usd": above(0),
        "sft_drills": at_least(0),
    }

    # Questions
    table: str | None = field(
        default=None,
        metadata={
            "help": "Questions and recorded replies: quickstart, a parquet/jsonl/json/csv/tsv file, or a Hub id."
        },
    )
    train_data: list[str] | None = field(
        default=None,
        metadata={"help": "Question sets: names of routers.data.questions.SETS, or files. Instead of a table."},
    )
    test_data: list[str] | None = field(default=None, metadata={"help": "Question sets of the evaluation."})
    question_seed: int = field(default=42, metadata={"help": "Of the draw from the question sets."})
    drop_incomplete: bool = field(
        default=False, metadata={"help": "Leave out queries of the table that lack a row of some member."}
    )

    # Pool
    pool: str = field(
        default="recorded",
        metadata=about("recorded: of the table. endpoint: OpenAI-compatible, of the catalogue.", choices=POOLS),
    )
    catalogue: str | None = field(default=None, metadata={"help": "Members, prices, endpoints (YAML)."})
    members: list[str] | None = field(default=None, metadata={"help": "Use these members only, in this order."})
    unseen_members: list[str] | None = field(
        default=None,
        metadata={"help": "Members that are absent in training; a second evaluation adds them by their descriptor."},
    )
    replies: str = field(
        default="full",
        metadata=about("Of a table; result: what follows the last ' = ' of the first line.", choices=REPLIES),
    )
    reply_cache: str | None = field(default=None, metadata={"help": "Folder of the endpoints' reply cache."})
    agent_prompt: str | None = field(
        default=None,
        metadata={"help": "What endpoints are told; holds {query} once. Default: Router-R1's, in our words."},
    )
    failed_call: str = field(
        default="lost",
        metadata=about("lost: a failed call drops the episode. observe: the policy is told.", choices=FAILED),
    )
    call_seconds: float = field(default=45.0, metadata={"help": "Deadline of one call, retries included."})

    # Prompt and reward
    prompt: str = field(default="router_r1", metadata=about("short: for the tiny policy.", choices=PROMPTS))
    action_format: str = field(
        default="tags",
        metadata=about(
            "tags: Router-R1's. json: members are functions in the policy's own "
            "chat template and form of tool calls; a turn without a call is the answer.",
            choices=FORMATS,
        ),
    )
    forward_empty: bool = field(
        default=False, metadata={"help": "A route without a query is valid, and sends the question itself."}
    )
    metric: str = field(default="em", metadata=about("What a right answer is.", choices=METRICS))
    reward: str = field(default="additive", metadata=about("See rewards/schemes.py.", choices=SCHEMES))
    cost_weight: float = field(
        default=0.2, metadata={"help": "Weight of cost; alpha of router_r1, lambda of xrouter."}
    )
    cost_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Several weights for one checkpoint: each training question draws one, which its prompt states "
            "and its reward takes. The policy is evaluated at each. Instead of cost_weight."
        },
    )
    format_weight: float = field(default=1.0, metadata={"help": "additive: penalty for an invalid episode."})
    cost_scale_usd: float | None = field(
        default=None,
        metadata={"help": "USD that count as 1 in the reward; default: 256 + 512 tokens of the dearest member."},
    )

    # Supervised start, from the replies of a table
    sft_drills: int = field(default=0, metadata={"help": "Short copying exercises among the episodes."})

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choices(self)
        if (self.table is None) == (self.train_data is None):
            raise ValueError("give either table, or train_data and test_data")
        if self.train_data is not None and not self.test_data:
            raise ValueError("train_data needs test_data: what is the policy tested on?")
        if self.pool == "recorded" and self.table is None:
            raise ValueError("pool: recorded needs a table")
        if self.pool == "endpoint" and self.catalogue is None:
            raise ValueError("pool: endpoint needs a catalogue, which names the endpoints")
        if self.cost_weights is not None and (not self.cost_weights or self.reward == "xrouter"):
            raise ValueError("cost_weights needs at least one weight, and reward: additive or router_r1")
