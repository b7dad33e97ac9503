"""`srpo export`: what is written is what RouterArena's checker and Semantic Router's config package take."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from routers.baselines import BASELINES
from routers.data.catalogue import Member
from routers.data.table import ReplyTable
from routers.router import Decision, load_router, write_router
from routers.serving.export import DOMAINS, EXAMPLES, arena_queries, main, one_member, semantic_router

MEMBERS = {name: Member(name, f"the {name} one", 0.1, 0.4) for name in ("small", "large")}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kNN router that sends sums to the small member and places to the large one."""
    rows = []
    for n in range(40):
        text = f"Calculate {n} + {3 * n}" if n % 2 else f"What is the capital of country {n}?"
        for name in MEMBERS:
            right = (name == "small") == bool(n % 2)
            rows.append({"query_id": f"q{n}", "query": text, "member": name, "split": "train", "correct": float(right),
                         "family": "math" if n % 2 else "places_far", "cost": 1e-5})  # fmt: skip
    folder = tmp_path_factory.mktemp("router")
    BASELINES["TF-IDF kNN"].how().fit(ReplyTable(rows, MEMBERS)).save(folder)
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "catalogue.yaml").write_text(
        "members:\n- {name: small, descriptor: s, price_in: 0.1, price_out: 0.4, model: gpt-4o-mini, api_key_env: KEY,"
        " base_url: https://api.example.com/v1}\n"
        "- {name: large, descriptor: l, price_in: 1, price_out: 4, model: gpt-4o}\n"
    )
    return folder


def test_routerarena_takes_the_predictions(router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = [
        {"global index": f"AsDiv_{n}", "prompt_formatted": f"Please calculate {n} + 2 {{braces}}"} for n in range(3)
    ] + [{"global index": "GeoBench_7", "prompt": "What is the capital of country 3?"}]
    queries = tmp_path / "dataset" / "router_data_10.json"
    queries.parent.mkdir()
    queries.write_text(json.dumps(dataset))
    output = tmp_path / "router_inference" / "predictions" / "mine.json"
    (tmp_path / "router_inference" / "config").mkdir(parents=True)
    words = ["--to", "routerarena", "--queries", str(queries), "--catalogue", str(router / "catalogue.yaml")]
    main([str(router), *words, "--output", str(output)])
    config = json.loads((tmp_path / "router_inference" / "config" / "mine.json").read_text())
    predictions = json.loads(output.read_text())
    # what check_config_prediction_files.py of RouteWorks/RouterArena looks at (1bc8176)
    models = config.get("pipeline_params", {}).get("models", [])
    assert config["pipeline_params"]["router_name"] == "mine" and set(models) == {"gpt-4o-mini", "gpt-4o"}
    assert len(predictions) == len(dataset)
    prompts = {one["global index"]: one.get("prompt_formatted") or one.get("prompt") for one in dataset}
    for one in predictions:
        assert prompts[one["global index"]] == one["prompt"] and one["prediction"] in models
        # and what generate_prediction_file.py writes
        assert list(one) == ["global index", "prompt", "prediction", "generated_result", "cost", "accuracy"]
        assert one["generated_result"] is one["cost"] is one["accuracy"] is None
    with load_router(router) as loaded:
        names = {"small": "gpt-4o-mini", "large": "gpt-4o"}
        assert [one["prediction"] for one in predictions] == [names[loaded.route(p).member] for p in prompts.values()]
    assert {one["prediction"] for one in predictions} == set(models)
    costs = json.loads(output.with_suffix(".cost.json").read_text())  # for check_model_costs
    assert costs["gpt-4o"] == {"input_token_price_per_million": 1.0, "output_token_price_per_million": 4.0}
    assert capsys.readouterr().out.splitlines()[0] == str(output)
    main([str(router), *words[:4], "--output", str(tmp_path / "x.json")])  # no checkout, no other names
    assert json.loads((tmp_path / "x.config.json").read_text())["pipeline_params"]["models"] == ["small", "large"]


# YAML tags of vllm-project/semantic-router, src/semantic-router/pkg/config (3d48f8c): canonical_config.go,
# canonical_providers.go, model_config_types.go, signal_config.go, decision_config.go. Its decoder knows no others.
FIELDS = {
    "config": "version listeners providers routing entrypoints recipes global",
    "providers": "defaults models",
    "defaults": "default_model reasoning_families default_reasoning_effort",
    "provider": "name reasoning_family provider_model_id backend_refs pricing reliability api_format "
    "external_model_ids",
    "pricing": "currency prompt_per_1m completion_per_1m cached_input_per_1m cache_write_per_1m",
    "backend": "name endpoint protocol weight type base_url provider auth_header auth_prefix extra_headers "
    "api_version chat_path api_key api_key_env",
    "routing": "modelCards signals projections decisions strategy",
    "card": "name param_size context_window_size description capabilities loras quality_score modality tags",
    "domain": "name description mmlu_categories model_scores",
    "score": "model score use_reasoning",
    "embedding": "name threshold candidates aggregation_method query_modality",
    "decision": "name description priority tier output_contract output_contract_spec rules modelRefs algorithm "
    "adaptations plugins candidateIterations emits annotations",
    "ref": "model lora_name weight use_reasoning reasoning_description reasoning_effort",
    "rules": "type name label predicate on_error operator conditions",
}


def check_semantic(config: dict) -> None:
    """validateCanonicalContract, validateDomainContracts and validateDecisionModelRefs, restated."""

    def known(kind: str, *found: dict) -> None:
        for one in found:
            assert set(one) <= set(FIELDS[kind].split()), (kind, one)

    providers, routing = config["providers"], config["routing"]
    known("config", config), known("providers", providers), known("defaults", providers["defaults"])
    known("provider", *providers["models"]), known("routing", routing), known("card", *routing["modelCards"])
    cards = [card["name"] for card in routing["modelCards"]]
    assert all(cards) and len(set(cards)) == len(cards) and providers["defaults"]["default_model"] in cards
    for model in providers["models"]:
        assert model["name"] in cards and (model.get("backend_refs") or model["provider_model_id"])
        known("pricing", model.get("pricing", {})), known("backend", *model.get("backend_refs", []))
        assert all(ref.get("endpoint") or ref.get("base_url") for ref in model.get("backend_refs", []))
    domains, embeddings = (routing["signals"].get(name, []) for name in ("domains", "embeddings"))
    known("domain", *domains), known("embedding", *embeddings)
    assert set(routing["signals"]) <= {"domains", "embeddings"} and routing["strategy"] in ("priority", "confidence")
    for domain in domains:
        assert set(domain["mmlu_categories"]) <= set(DOMAINS)
        known("score", *domain["model_scores"])
        assert {one["model"] for one in domain["model_scores"]} == set(cards)  # "score every candidate and avoid 1.0"
        assert all(0 <= one["score"] < 1 and one["use_reasoning"] is False for one in domain["model_scores"])
    for rule in embeddings:
        assert (
            0 < rule["threshold"] < 1 and rule["aggregation_method"] in ("mean", "max", "any") and rule["candidates"]
        )
    names = [decision["name"] for decision in routing["decisions"]]
    assert len(set(names)) == len(names)
    declared = {"domain": {one["name"] for one in domains}, "embedding": {one["name"] for one in embeddings}}
    for decision in routing["decisions"]:
        known("decision", decision), known("rules", decision["rules"], *decision["rules"]["conditions"])
        known("ref", *decision["modelRefs"])
        assert all(ref["model"] in cards and ref["use_reasoning"] is not None for ref in decision["modelRefs"])
        assert all(one["name"] in declared[one["type"]] for one in decision["rules"]["conditions"])
        assert decision["algorithm"] == {"type": "static"}


def test_semantic_router_takes_the_config(router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.yaml"
    words = ["--to", "semantic-router", "--table", str(router / "table.jsonl"), "--output", str(output)]
    main([str(router), *words, "--catalogue", str(router / "catalogue.yaml")])
    config = yaml.safe_load(output.read_text())
    check_semantic(config)
    assert "2 decisions; 40 of 40 queries go where the router sends them" in capsys.readouterr().out
    first = {one["name"]: one["modelRefs"][0]["model"] for one in config["routing"]["decisions"]}
    assert first == {"places far": "large", "math": "small"}
    [domain], [rule] = (config["routing"]["signals"][name] for name in ("domains", "embeddings"))
    assert domain["name"] == "math" and [one["score"] for one in domain["model_scores"]] == [0.999, 0.0]
    assert rule["name"] == "places far" and len(rule["candidates"]) == EXAMPLES
    small = config["providers"]["models"][0]
    assert small["pricing"] == {"currency": "USD", "prompt_per_1m": 0.1, "completion_per_1m": 0.4}
    assert small["backend_refs"][0]["base_url"] == "https://api.example.com/v1" and "KEY" in str(small)


def test_shares_by_hand() -> None:
    families = ["law"] * 4 + [""]
    queries = [{"query": f"q{n}", "family": family} for n, family in enumerate(families)]
    members = [Member("a", "A"), Member("b", "B"), Member("c", "C")]
    config = semantic_router(queries, ["b", "b", "b", "a", "a"], members)
    check_semantic(config)
    law, other = config["routing"]["signals"]["domains"]
    assert [(one["model"], one["score"]) for one in law["model_scores"]] == [("b", 0.75), ("a", 0.25), ("c", 0.0)]
    assert (other["name"], config["providers"]["defaults"]["default_model"]) == ("other", "b")


def test_what_cannot_be_exported_says_why(router: Path, tmp_path: Path) -> None:
    for kind, why in {
        "step_routing": "decides inside an agent's loop",
        "think_route": "asks members in turns",
    }.items():
        write_router(tmp_path, kind, {})
        with pytest.raises(
            ValueError, match=rf"{why}, and routerarena takes one model per query: it cannot be exported"
        ):
            main([str(tmp_path), "--to", "routerarena", "--output", str(tmp_path / "x.json")])
    with pytest.raises(ValueError, match="give --queries to routerarena, and --table to semantic-router"):
        main([str(router), "--to", "routerarena", "--output", "x.json", "--table", "quickstart"])
    with pytest.raises(ValueError, match=r"for query 'q1' the router chooses no member \(--fallback MEMBER sends"):
        one_member("q1", Decision((), {}))
    with pytest.raises(ValueError, match="for query 'q1' the router chooses several members"):
        one_member("q1", Decision(("a", "b"), {}), "a")
    assert one_member("q1", Decision((), {}), "a") == "a"
    path = tmp_path / "data.json"
    for content in ('[{"prompt": "x"}]', '{"a": 1}', "[", '[{"global index": "a"}]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"data\.json: is no list of entries with 'global index'"):
            arena_queries(path)


@pytest.mark.parametrize(
    "entries, said",
    [
        ([], r"data\.json: holds no entry"),
        ([{"global index": 3, "prompt": "x"}], "entry 1: 'global index' is 3; it must be a text"),
        ([{"global index": "a", "prompt": " "}], "entry 1: 'prompt' is ' '; it must be a text, and not empty"),
        ([{"global index": "a", "prompt": "x"}] * 2, "entry 2: the global index 'a' stands twice"),
        ({"x": 1}, "is no list of entries with 'global index' and 'prompt_formatted'"),
    ],
)
def test_odd_queries_of_routerarena_are_named(entries: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=said):
        arena_queries(tmp_path / "data.json")
