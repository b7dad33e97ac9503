"""Turns published routing data sets into the table format of ``routers.data.table``: `srpo convert NAME SOURCE`.

None of the data ships with this package; ``SETS`` says where each comes from. Where a set lacks what our table needs,
the choice is made here, once:

* token counts: estimated as one token per ``CHARS_PER_TOKEN`` characters of the query or the reply; a reply that was
  not published counts as ``UNKNOWN_REPLY_TOKENS``, one of multiple choice as 1;
* prices: USD per call where the set has them, else its price list, else list prices as we remember them, else 0;
* split: the set's own (its validation part is trained on), else ``routers.data.table.split_of``;
* repeated queries (by normalised text): the first one stays;
* entries that are not as the set has them are left out with their reasons, up to a share of them.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from srpo.quarantine import MAX_BAD_SHARE

if TYPE_CHECKING:
    from routers.data.converters.build import Converted

EVALUATION_ONLY = b"srpo.evaluation_only"
"""Key in a parquet file's metadata: the name of a set that must not be trained on."""
_PICKLES = (".pkl", ".pickle", ".pt")


@dataclass(frozen=True)
class PublishedSet:
    """A set that `convert` reads."""

    reader: str
    """Module of this package, and the function in it: ``(source, TableBuilder)``."""
    source: str
    licence: str
    has: str
    lacks: str
    prices: str
    evaluation_only: bool = False
    unpickled: str = ""
    """How its pickle is saved in a form that is read, where not as a frame."""


_UNPRICED = "none: all members are free, until you write price_in and price_out into catalogue.yaml"
_GITHUB, _HUB = "github.com/", "huggingface.co/datasets/"
SETS: dict[str, PublishedSet] = {
    "routellm_mmlu": PublishedSet(
        "routellm:mmlu", f"{_GITHUB}lm-sys/RouteLLM", "Apache-2.0",
        "2 models, 57 subjects", "replies, tokens, split, prices", "list prices of 2023, from memory",
    ),
    "routellm_gsm8k": PublishedSet(
        "routellm:gsm8k", f"{_GITHUB}lm-sys/RouteLLM", "Apache-2.0",
        "2 models, replies", "tokens, split, prices", "list prices of 2023, from memory",
    ),
    "llmrouter": PublishedSet(
        "ulab:llmrouter", f"{_GITHUB}ulab-uiuc/LLMRouter", "MIT",
        "9 models, 14 tasks, split, prices", "nothing", "the set's price list",
    ),
    "llmrouter_nq6": PublishedSet(
        "ulab:llmrouter_nq6", f"{_GITHUB}ulab-uiuc/LLMRouter", "MIT",
        "the 6 models of Router-R1, replies, costs", "split", "those that explain the set's costs",
    ),
    "routeprofile": PublishedSet(
        "ulab:routeprofile", f"{_GITHUB}ulab-uiuc/RouteProfile", "MIT",
        "8 models, 12 tasks, replies, tokens, prices", "split", "the set's price list",
    ),
    "gsm8k_4models": PublishedSet(
        "gsm8k:gsm8k_4models", f"{_GITHUB}openai/grade-school-math", "MIT",
        "4 models of 2021, replies", "tokens, split, prices", "list prices of 2022, from memory",
    ),
    "xroutebench": PublishedSet(
        "ulab:xroutebench", f"{_HUB}ulab-ai/xRouteBench", "none stated",
        "18 models, 7 sets, replies, tokens, split, prices", "nothing", "the set's price list",
    ),
    "routerbench": PublishedSet(
        "wide:routerbench", f"{_HUB}withmartian/routerbench", "none stated (code MIT)",
        "11 models of 2023, replies, USD per call", "split, tokens (estimated)", "USD per call",
    ),
    "llmrouterbench": PublishedSet(
        "llmrouterbench:llmrouterbench", f"{_HUB}NPULH/LLMRouterBench", "MIT (code)",
        "33 models in two pools, 21 datasets, replies, tokens, USD per call", "split", "USD per call",
    ),
    "embedllm": PublishedSet(
        "matrix:embedllm", f"{_HUB}RZ412/EmbedLLM", "Apache-2.0",
        "112 models, right or wrong, split", "replies, tokens, prices", _UNPRICED,
    ),
    "routereval": PublishedSet(
        "matrix:routereval", f"{_HUB}linggm/RouterEval", "MIT",
        "pools of 3 to 1,000 models, scores, split", "replies, tokens, prices (a pickle: save it as JSON)", _UNPRICED,
        unpickled="as JSON, by the lines at the top of routers/data/converters/matrix.py",
    ),
    "sprout": PublishedSet(
        "wide:sprout", f"{_HUB}CARROT-LLM-Routing/SPROUT", "none stated",
        "13 models, judged scores, tokens, split", "nothing", "those of the authors' code (somerstep/CARROT)",
    ),
    "routerarena": PublishedSet(
        "routerarena:routerarena", f"{_GITHUB}RouteWorks/RouterArena", "Apache-2.0",
        "the models that submitted routers asked, replies, USD per call", "models that all queries have",
        "USD per call", evaluation_only=True,
    ),
    "bfcl": PublishedSet(
        "bfcl:bfcl", f"{_GITHUB}ShishirPatil/gorilla (pip install bfcl-eval)", "Apache-2.0",
        "your own models' result and score folders, tokens, seconds", "split, prices", _UNPRICED,
    ),
    "wide": PublishedSet(
        "wide:wide", "any table with columns NAME and NAME|cost per model", "yours",
        "scores and USD per call", "what it has no column for", "USD per call",
    ),
}  # fmt: skip


def convert(
    name: str, source: str | Path, members: list[str] | None = None, max_bad_share: float = MAX_BAD_SHARE
) -> Converted:
    """Convert the set ``name`` (a key of ``SETS``).

    Args:
        source: the file, or a folder above what was downloaded from the official place.
        members: the pool, names or several of them with commas between; None: the one that keeps most replies.
        max_bad_share: of the entries of a file; above it nothing is converted.

    Raises:
        ValueError: unknown name or member, a pickle, or a file that is not as the set has it.
        FileNotFoundError: the set is not there; the message says where to get it.
    """
    if name not in SETS:
        raise ValueError(f"no data set {name!r}; known are {', '.join(SETS)}")
    found, path = SETS[name], Path(source).expanduser()
    _refuse_pickles(found, path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; download {name} from {found.source}")
    from routers.data.converters.build import TableBuilder

    module, _, function = found.reader.partition(":")
    table = TableBuilder(name, max_bad_share)
    try:
        getattr(importlib.import_module(f"{__name__}.{module}"), function)(path, table)
    except FileNotFoundError as error:
        _refuse_pickles(found, *sorted(path.rglob("*")))
        told = f"{error.filename}: {error.strerror}"
        raise FileNotFoundError(f"{told}; download {name} from {found.source}") from error
    return table.finish(members, found.evaluation_only)


def _refuse_pickles(found: PublishedSet, *paths: Path) -> None:
    if pickles := [path for path in paths if path.suffix.lower() in _PICKLES]:
        path = pickles[0]
        frame = f"pandas.read_pickle('{path.name}').to_parquet('{path.stem}.parquet')"
        how = found.unpickled or f'as parquet: python -c "import pandas; {frame}"'
        raise ValueError(
            f"{path}: pickles are not read, because loading one runs its code. If you trust it, save it {how}"
        )


def refuse_training(table: str | Path) -> None:
    """ValueError for a table that was converted from a set which is for evaluation only."""
    path = Path(table).expanduser()
    if path.suffix != ".parquet" or not path.is_file():
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = None
    with suppress(pa.ArrowException):  # its reader says what is wrong with it
        metadata = pq.read_schema(path).metadata
    if name := (metadata or {}).get(EVALUATION_ONLY, b"").decode():
        raise ValueError(
            f"{table}: {name} is for evaluation only, and nothing is trained on it: train on another table, and let "
            "the set's own rules judge the router (srpo export)"
        )
