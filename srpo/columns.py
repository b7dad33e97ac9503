"""Columns of others: which names they may have, what the words of ours hold, and texts that can be encoded.

Users bring columns in four ways: a dataset, a world or an environment, `log_extra` of a reward function, and metrics.
What the library itself passes along with them has names that begin with `INTERNAL`, which none of them may have; a
name that would hide a column, ours or TRL's, is an error that names it. The documented words (`srpo.types`: `cost`,
`lost`, ...) belong to the world; a dataset's column of such a name is an ordinary column of the dataset.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from logging import getLogger
from typing import Any

from srpo.texts import well_formed
from srpo.types import CORRECT, COST, FEEDBACK, LOST, STOP, Columns

logger = getLogger(__name__)

INTERNAL = "srpo/"
"""Namespace of the library's own columns."""
LOST_ROW = INTERNAL + "lost"
"""Why a row is lost, or None: taken out again before a reward function sees its columns."""
TURNS = "turns"
"""Column of the rollout: how many turns the policy had."""
CALLS = "calls"
"""Column of a world: how many calls of the pool an episode made."""
FORMAT_ERROR = "format_error"
"""Column of a world: "" or what was wrong with the form of the policy's words."""
MEMBERS = "members"
"""Column of a world: the members that an episode asked, in order, one name per call."""
OF_ROLLOUT = (STOP, LOST, TURNS)
"""Columns that the rollout adds to those of an environment; only `LOST` may come from the episode."""
TABLE_COLUMNS = ("step", "prompt", "completion", "advantage", "branch", "importance_weight")
"""Columns of the completions table that are its own; the last one where groups are not drawn."""
_TRL_ARGUMENTS = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments",
)  # fmt: skip
"""Arguments that TRL gives every reward function beside the columns."""
_DEEPEST = 50
"""Levels of lists and mappings that a value may have: pyarrow's stack ends at a list that holds itself."""
PICTURES = ("image", "images")
_METRIC_PREFIXES = (
    INTERNAL, "completions/", "rewards/", "rollout/", "route/", "calls/", "sampling/", "router/", "clip_ratio/",
    "loss/", "records/", "tools/", "eval_",
)  # fmt: skip
_METRICS = (
    "loss", "reward", "reward_std", "frac_reward_zero_std", "num_tokens", "entropy", "kl", "learning_rate",
    "grad_norm", "epoch", "step", "is_ratio", "is_clipped", "aux_loss", "cost/per_query_usd",
    "cost/spent_usd", "correct/mean", "invalid/share",
)  # fmt: skip


def check_dataset_columns(names: Iterable[Any], environment: bool) -> None:
    """ValueError for a dataset's column whose name is taken by TRL, by the library, or by the rollout.

    `completion`, which datasets for supervised training have, is no error: TRL keeps it from the
    rewards, and this says so.
    """
    for name in names:
        if name == "completion":
            logger.warning("the dataset's column 'completion' reaches no reward function (TRL leaves it out)")
        if str(name).startswith(INTERNAL):
            why = f"names that begin with {INTERNAL!r} are the library's own"
        elif name in _TRL_ARGUMENTS:
            why = "TRL passes something else to every reward function by that name"
        elif environment and name in OF_ROLLOUT:
            why = "the rollout of an environment gives every completion a column of that name"
        else:
            continue
        raise ValueError(f"the dataset's column {name!r} must be renamed: {why}")


def check_no_pictures(data: Any) -> None:
    """ValueError for a dataset's column that TRL would show to the policy as pictures; for policies that read text.

    A column without a single value, as merging leaves it, is none (`without_pictures`).
    """
    features = getattr(data, "features", None) or {}
    for name in PICTURES:
        kind: Any = features.get(name)
        while hasattr(kind, "feature"):  # a list of these
            kind = kind.feature
        if name in (getattr(data, "column_names", None) or ()) and getattr(kind, "dtype", None) != "null":
            raise ValueError(
                f"the dataset's column {name!r} must be renamed or removed: TRL shows a column of that name to the "
                "policy as pictures, and this policy reads text only"
            )


def without_pictures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without columns of pictures that hold none: TRL takes None for one."""
    return [{k: v for k, v in row.items() if k not in PICTURES or v} for row in rows]


def checked_columns(
    columns: Any, rows: Sequence[Mapping[str, Any]], taken: Collection[str]
) -> tuple[Columns, list[str]]:
    """What a world returned for a batch, its texts well formed, and where they were not.

    Args:
        columns: name -> one value per completion.
        rows: the dataset rows of the completions.
        taken: names of the completions table, reward functions included.

    Raises:
        ValueError: names the column, and the row where there is one.
    """
    if not isinstance(columns, Mapping):
        raise ValueError(f"the world returned a {type(columns).__name__}, not a dict of columns")
    found: Columns = {}
    repaired: list[str] = []
    for name, values in columns.items():
        if not isinstance(name, str) or name.startswith(INTERNAL) or name in _TRL_ARGUMENTS:
            raise ValueError(f"the world's column {name!r} has a name that TRL or the library uses itself; rename it")
        if name in taken:
            raise ValueError(f"the world's column {name!r} has a name that the completions table uses already")
        values = as_list(values)
        if len(values) != len(rows):
            raise ValueError(
                f"the world returned {len(values)} values in column {name!r} for {len(rows)} completions; "
                "it must return one per completion"
            )
        for i, (value, row) in enumerate(zip(values, rows, strict=True)):
            check_word(name, value, f"row {i}")
            if value is not None and name in row and not _same(value, row[name]):
                raise ValueError(
                    f"both the dataset and the world have a column {name!r}, with different values (row {i}: "
                    f"{row[name]!r:.80} and {value!r:.80}); rename one of them"
                )
        values = list(values)
        for i, value in enumerate(values):
            values[i], broken = repaired_value(value)
            repaired += [f"column {name!r}, row {i}"] * broken
        name_in_table, broken = repaired_value(name)
        repaired += [f"the name of column {name!r}"] * broken
        if name_in_table in found:
            raise ValueError(f"the world has two columns of the name {name_in_table!r}; rename one of them")
        found[name_in_table] = values
    return found, repaired


def check_word(name: str, value: Any, where: str) -> None:
    """ValueError where a column with one of the world's documented names holds something else.

    Args:
        where: names the row in the message.
    """
    if value is None or name not in _WORDS:
        return
    holds, what = _WORDS[name]
    if not holds(value):
        raise ValueError(
            f"the world's column {name!r} must be {what}, or None; {where} has {value!r:.80}. Rename the column if it "
            "means something else"
        )


def checked_extra(name: Any, values: Any, rows: int, taken: Collection[str]) -> tuple[str, list[Any]]:
    """A column that a reward function logs, repaired where it comes in.

    Raises:
        ValueError: its name is one of `taken`, or it has not `rows` values.
    """
    name, values = repaired_value(name)[0], as_list(values)
    if not isinstance(name, str) or name.startswith(INTERNAL) or name in taken:
        raise ValueError(f"log_extra: the name {name!r} is taken in the completions table; use another one")
    if len(values) != rows:
        raise ValueError(f"log_extra: column {name!r} got {len(values)} values for {rows} completions")
    return name, [repaired_value(value)[0] for value in values]


def check_reward_names(names: Sequence[str]) -> None:
    """ValueError for reward functions of one name, or of a name that the completions table uses."""
    for i, name in enumerate(names):
        if name in TABLE_COLUMNS or name.startswith(INTERNAL) or name in names[:i]:
            why = "two of them have it" if name in names[:i] else "the completions table has a column of that name"
            raise ValueError(f"the reward function {name!r} needs another name: {why}")


def checked_metric(source: str, name: Any, value: Any) -> float:
    """The metric of a reward function (`log_metric`) or an environment, as a number.

    Raises:
        ValueError: a name of the trainer's own metrics, or no number.
    """
    if not isinstance(name, str) or name in _METRICS or name.startswith(_METRIC_PREFIXES):
        raise ValueError(f"{source}: the trainer logs metrics of its own as {name!r}; use another name")
    if not _is_number(value):
        raise ValueError(f"{source}: metric {name!r} is {value!r:.80}, not a number")
    return float(value)


def as_list(values: Any) -> list[Any]:
    """A column as a list: of numbers where it is a tensor or an array."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else [values]


def repaired_value(value: Any) -> tuple[Any, int]:
    """The value with every text in it well formed, and how many texts were not; one that is `too_deep` as it is."""
    count = 0
    if too_deep(value) or broken_text(value) is None:
        return value, count

    def repaired(value: Any) -> Any:
        nonlocal count
        if isinstance(value, str):
            text = well_formed(value)
            count += text is not value
            return text
        if type(value) is dict:
            return {repaired(key): repaired(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(repaired(item) for item in value)
        return value

    return repaired(value), count


def too_deep(value: Any, around: tuple[int, ...] = ()) -> bool:
    """Whether lists and mappings lie in each other without end, or nearly."""
    if not isinstance(value, (list, tuple, dict)):
        return False
    if id(value) in around or len(around) == _DEEPEST:
        return True
    parts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    return any(too_deep(part, (*around, id(value))) for part in parts)


def broken_text(value: Any) -> str | None:
    """What is wrong with a text, or with one inside a list or mapping: "" is not valid; None: nothing."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"is not valid Unicode at character {error.start}"
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = (*value.keys(), *value.values())
    elif isinstance(value, (list, tuple)):
        parts = value
    return next((problem for part in parts if (problem := broken_text(part)) is not None), None)


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b) or bool(a != a and b != b)  # a NaN that is repeated is no contradiction
    except Exception:  # arrays, tensors: whatever they are, they are two things
        return False


def _is_number(value: Any) -> bool:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return isinstance(value, int)
    try:
        float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several
        return False
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_WORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    COST: (_is_number, "a number of USD"),
    CORRECT: (_is_number, "a number from 0 to 1"),
    CALLS: (_is_number, "a number of calls"),
    FEEDBACK: (_is_text, "a text"),
    LOST: (_is_text, "a text that says why the completion was lost"),
    MEMBERS: (
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
}
