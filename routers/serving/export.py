"""Write a router's choices in the form of others: RouterArena's submission, or vLLM Semantic Router's config.

srpo export outputs/quickstart/router --to routerarena --queries RouterArena/dataset/router_data.json \\
    --output RouterArena/router_inference/predictions/mine.json
srpo export outputs/quickstart/router --to semantic-router --table quickstart --output config.yaml

RouterArena asks each query of the member that the router chose. Its names of models are those of its list: a member's
`model` in --catalogue, else its name. Semantic Router has no policies like ours, so each family of the table's queries
becomes a decision, for the member that the router chooses most often there; what that loses is printed.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from routers.data.catalogue import Member
from routers.data.table import load_table, quickstart_table
from routers.router import Decision, load_router, read_router
from srpo.cli import Parser
from srpo.ranges import at_least, ranged

_TURNS = {"step_routing": "decides inside an agent's loop", "think_route": "asks members in turns"}
DOMAINS = (
    *("biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history"),
    *("law", "math", "other", "philosophy", "physics", "psychology"),
)
"""That Semantic Router's own classifier knows (pkg/config/domain_contract.go); other families go by examples."""
EXAMPLES = 8
_THRESHOLD = 0.72
"""Of a query's similarity to an example, as in Semantic Router's reference config; not tuned."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("router", help="folder or Hub id of a router that decides once per query")
    parser.add_argument("--to", required=True, choices=["routerarena", "semantic-router"])
    parser.add_argument("--output", required=True, type=Path, metavar="FILE")
    parser.add_argument("--queries", type=Path, help="RouterArena's dataset/router_data.json (or router_data_10.json)")
    parser.add_argument("--table", help="queries with families, for semantic-router: quickstart, or a file")
    parser.add_argument(
        "--catalogue", type=Path, help="the pool as it is now: names of models, prices, endpoints (YAML)"
    )
    parser.add_argument("--cost_weight", type=ranged(at_least(0)), help="price sensitivity, where it was trained")
    parser.add_argument("--fallback", metavar="MEMBER", help="for queries where the router abstains, else an error")
    args = parser.parse_args(argv)
    kind = read_router(args.router).kind
    if kind in _TURNS:
        raise ValueError(
            f"{args.router} {_TURNS[kind]}, and {args.to} takes one model per query: it cannot be exported"
        )
    arena = args.to == "routerarena"
    if (args.queries is None) is arena or (args.table is None) is not arena:
        raise ValueError("give --queries to routerarena, and --table to semantic-router")
    queries = arena_queries(args.queries) if arena else table_queries(args.table)
    with load_router(args.router, catalogue=args.catalogue) as router:
        items: list[Any] = [query["query"] for query in queries] if arena or kind != "fitted" else list(queries)
        found = router.route_all(items, cost_weight=args.cost_weight)
        members: Sequence[Member] = router.members
    if args.fallback not in (None, *(member.name for member in members)):
        raise ValueError(f"--fallback {args.fallback}: the members are {', '.join(member.name for member in members)}")
    pairs = zip(queries, found, strict=True)
    chosen = [one_member(query["query_id"], decision, args.fallback) for query, decision in pairs]
    if abstained := sum(not decision.members for decision in found):
        print(f"{abstained} of {len(found)} queries, on which the router abstains, go to {args.fallback}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if arena:
        print(*write_arena(args.output, queries, chosen, members), sep="\n")
        return
    config = semantic_router(queries, chosen, members)
    args.output.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    first = {one["name"]: one["modelRefs"][0]["model"] for one in config["routing"]["decisions"]}
    kept = sum(first[_family(query)] == member for query, member in zip(queries, chosen, strict=True))
    print(f"{args.output}: {len(first)} decisions; {kept} of {len(chosen)} queries go where the router sends them")
    print("add listeners, and backend_refs where there are none, and check it: vllm-sr validate --config FILE")


def one_member(query_id: str, decision: Decision, fallback: str | None = None) -> str:
    """The member chosen, or the fallback of a router that abstains. ValueError where it is not one."""
    if not decision.members and fallback:
        return fallback
    if len(decision.members) != 1:
        told = "several members" if decision.members else "no member (--fallback MEMBER sends such queries there)"
        raise ValueError(f"for query {query_id!r} the router chooses {told}; exported is one per query")
    return decision.members[0]


def arena_queries(path: Path) -> list[dict[str, str]]:
    """The dataset as RouterArena's scripts/process_datasets/prep_datasets.py writes it.

    Raises:
        ValueError: names the file and the entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [
            {"query_id": entry["global index"], "query": entry.get("prompt_formatted") or entry["prompt"]}
            for entry in entries
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: is no list of entries with 'global index' and 'prompt_formatted' ({error})"
        ) from None
    if not found:
        raise ValueError(f"{path}: holds no entry")
    seen: set[str] = set()
    for number, entry in enumerate(found, start=1):
        for field, value in (("global index", entry["query_id"]), ("prompt", entry["query"])):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{path}: entry {number}: {field!r} is {value!r}; it must be a text, and not empty")
        if entry["query_id"] in seen:
            raise ValueError(f"{path}: entry {number}: the global index {entry['query_id']!r} stands twice")
        seen.add(entry["query_id"])
    return found


def table_queries(table: str) -> list[dict[str, str]]:
    """The training queries of a table, or all where there are none."""
    found = quickstart_table() if table == "quickstart" else load_table(table)
    return found.queries("train") or found.queries()


def write_arena(
    path: Path, queries: Sequence[Mapping[str, str]], chosen: Sequence[str], members: Sequence[Member]
) -> list[Path]:
    """The predictions, and what belongs with them: the config, and prices for model_cost. Returns the files.

    The form is that of router_inference/check_config_prediction_files.py and generate_prediction_file.py.
    """
    names = {member.name: member.model or member.name for member in members}
    rows = [
        {"global index": query["query_id"], "prompt": query["query"], "prediction": names[member]}
        | dict.fromkeys(("generated_result", "cost", "accuracy"))
        for query, member in zip(queries, chosen, strict=True)
    ]
    config = {"pipeline_params": {"router_name": path.stem, "models": list(names.values())}}
    kinds = {"input_token_price_per_million": "price_in", "output_token_price_per_million": "price_out"}
    prices = {
        names[one.name]: {theirs: getattr(one, ours) for theirs, ours in kinds.items()}
        for one in members
        if one.priced
    }
    checkout = path.parent.parent / "config"
    folder = checkout if path.parent.name == "predictions" and checkout.is_dir() else None
    parts = {
        path: rows,
        folder / path.name if folder else path.with_suffix(".config.json"): config,
        path.with_suffix(".cost.json"): prices,
    }
    for file, content in parts.items():
        file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return list(parts)


def semantic_router(
    queries: Sequence[Mapping[str, str]], chosen: Sequence[str], members: Sequence[Member]
) -> dict[str, Any]:
    """A config of version v0.3 (src/semantic-router/pkg/config), without listeners.

    A family that is one of `DOMAINS` is recognised by Semantic Router's classifier, any other by its similarity to
    `EXAMPLES` of its queries. `algorithm: static` takes the highest of `model_scores`, which are the shares of the
    router's choices there, or the first of `modelRefs`.
    """
    shares: dict[str, Counter[str]] = {}
    examples: dict[str, list[str]] = {}
    for query, member in zip(queries, chosen, strict=True):
        shares.setdefault(_family(query), Counter())[member] += 1
        examples.setdefault(_family(query), []).append(query["query"])
    domains, embeddings, decisions = [], [], []
    for family, counts in shares.items():
        best = [*counts.most_common(), *((member.name, 0) for member in members if member.name not in counts)]
        if family in DOMAINS:  # a score of 1 would mean "the first candidate"
            scores = [
                {"model": name, "score": round(min(count / counts.total(), 0.999), 3), "use_reasoning": False}
                for name, count in best
            ]
            domains.append({"name": family, "mmlu_categories": [family], "model_scores": scores})
        else:
            candidates = examples[family][:: max(1, len(examples[family]) // EXAMPLES)][:EXAMPLES]
            rule = {"threshold": _THRESHOLD, "aggregation_method": "max", "candidates": candidates}
            embeddings.append({"name": family, **rule})
        signal = "domain" if family in DOMAINS else "embedding"
        decisions.append(
            {
                "name": family,
                "priority": 100,
                "rules": {"operator": "AND", "conditions": [{"type": signal, "name": family}]},
                "modelRefs": [{"model": name, "use_reasoning": False} for name, _ in best],
                "algorithm": {"type": "static"},
            }
        )
    signals = {name: rules for name, rules in (("domains", domains), ("embeddings", embeddings)) if rules}
    return {
        "version": "v0.3",
        "providers": {
            "defaults": {"default_model": Counter(chosen).most_common(1)[0][0]},
            "models": [_provider(member) for member in members],
        },
        "routing": {
            "strategy": "priority",
            "modelCards": [{"name": one.name, "description": one.descriptor} for one in members],
            "signals": signals,
            "decisions": decisions,
        },
    }


def _family(query: Mapping[str, str]) -> str:
    name = query["family"].replace("_", " ").strip().lower()
    return name or "other"


def _provider(member: Member) -> dict[str, Any]:
    told: dict[str, Any] = {"name": member.name, "provider_model_id": member.model or member.name}
    if member.priced:
        prices = {"prompt_per_1m": member.price_in, "completion_per_1m": member.price_out}
        told["pricing"] = {"currency": "USD", **prices}
    if member.base_url:
        key = {"api_key_env": member.api_key_env} if member.api_key_env else {}
        told["backend_refs"] = [{"name": member.name, "provider": "openai", "base_url": member.base_url, **key}]
    return told
