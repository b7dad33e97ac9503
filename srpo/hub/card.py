"""The model card of a trained router: what was optimised, from which recipe, how well it does, how to load it."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from srpo.redact import redacted, scrubbed
from srpo.strict_yaml import YamlError, read_yaml_text

_PAPERS = {"GRPO": "2402.03300", "SDPO": "2601.20802", "SRPO": "2604.02288", "BoPO": "2602.21227"}

_OBJECTIVES = {
    "grpo": (
        ("GRPO",),
        "Group relative policy optimisation: each completion is credited with its reward minus the mean of its group.",
    ),
    "sdpo": (
        ("SDPO",),
        "Self-distillation policy optimisation: the policy, shown a correct sibling or feedback, re-scores the "
        "completion token by token and is distilled into the policy without that context.",
    ),
    "srpo": (
        ("SRPO", "SDPO", "GRPO"),
        "Sample-routed policy optimisation: failed completions for which the self-teacher has information are "
        "distilled (SDPO) with entropy weights, all others are credited with their reward (GRPO).",
    ),
    "bopo": (
        ("BoPO", "GRPO"),
        "BoPO-style policy optimisation: decisions are credited with a boundary-relative reward beside what always "
        "using the cheap and always using the expensive executor earn on the same task. The paper's formulas are not "
        "public; these are inferred.",
    ),
}

_TASKS = {
    "query_routing": "A query router: it reads a query and the descriptions and prices of a pool of models, and names "
    "the one that answers it.",
    "encoder_routing": "A query router: it encodes a query, and what the models of a pool can do and cost, and "
    "gives the probability that each shall answer.",
    "think_route": "A think/route agent: it thinks, asks models of a pool, reads their replies, and answers.",
    "step_routing": "A step router: at each step of an agent it decides which executor acts, under a hard budget.",
    None: "A policy trained for routing.",
}
_USES = {
    "query_routing": """\
with load_router({name}) as router:
    decision = router.route("What is 17 + 25?")
    print(decision.member, decision.scores, decision.usd)""",
    "think_route": """\
with load_router({name}) as agent:
    decision = agent.route("What is 17 + 25?")  # whom its first turn asks
    print(decision.member, decision.scores)
# load_router({name}, catalogue="pool.yaml"), with a base_url for each member, has them asked:
# agent.answer("What is 17 + 25?", max_cost_usd=0.001)""",
    "step_routing": """\
bounds = {bounds}  # USD that the next call costs at most
with load_router({name}) as router, router.session("put a clean mug in coffeemachine.") as session:
    executor = session.choose({observation}, bounds)
    print(executor)  # make its call, then tell what it cost and what it did
    session.paid(bounds[executor], "look")""",
}
_USES["encoder_routing"] = _USES["query_routing"]
_FIRST = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, and a coffeemachine 1.\n\n"
    "Your task is to: put a clean mug in coffeemachine."
)
_HOW = "## How to use it\n\n"
_LIMITS = """\
- The policy knows the {members} that it was trained with, at the prices it was trained with. Evaluate again when
  either changes.
- It chooses; it does not check what comes back. Replies are untrusted text.
- Rewards were computed by programs; what they do not measure was not optimised.
"""


def model_card(
    *,
    objective: str,
    model_name: str,
    base_model: str | None = None,
    adapter: bool = False,
    repo_id: str | None = None,
    router: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    heldout_table: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    picture: str | None = None,
    costs: Sequence[str] = (),
    hashes: Mapping[str, str] | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Markdown with the Hub's YAML metadata in front.

    Args:
        objective: grpo, sdpo, srpo or bopo.
        model_name: heading of the card.
        base_model: Hub id of the model that was trained; None when it was made from nothing or is a local folder.
        adapter: the weights are a PEFT adapter and need `base_model`.
        repo_id: where it is pushed to, for the example of its use; None: that example loads the card's own folder.
        router: what `router.yaml` beside the policy says: its kind and settings. None, or of a kind that is not ours:
            the example loads weights alone.
        recipe: the keys that were set; secrets are redacted here once more.
        command: words of the command line; None: this process's, with paths below the working directory relative.
        heldout_table: a markdown table of held-out results.
        results: the same as numbers, for the Hub's `model-index`: `name`, `dataset` and `metrics` (name -> number).
        picture: file beside the card, of score and cost.
        costs: phrases on what the training took.
        hashes: sha256 of files and of what the policy was made from, by name.
        dataset_name: Hub id of the training data.
        tags: more tags.

    Raises:
        ValueError: unknown objective.
    """
    if objective not in _OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; one of {', '.join(_OBJECTIVES)}")
    papers, sentence = _OBJECTIVES[objective]
    all_tags = [*sorted(tags), "trl", "srpo", "llm-routing", "reinforcement-learning", objective]
    metadata: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(all_tags)),
    }
    if router and router.get("kind") == "encoder_routing":
        metadata["pipeline_tag"] = "text-classification"
    if base_model:
        metadata["base_model"] = base_model
    if dataset_name:
        metadata["datasets"] = dataset_name
    if results:
        task = {"type": metadata["pipeline_tag"], "name": "Routing"}
        metadata["model-index"] = [{"name": model_name, "results": [_result(one, task) for one in results]}]

    cites = ", ".join(f"[{name}, arXiv:{_PAPERS[name]}](https://arxiv.org/abs/{_PAPERS[name]})" for name in papers)
    router = router if router and router.get("kind") in _USES else None  # a task of another package says its own
    kind = router["kind"] if router else None
    origin = f"Trained from `{base_model}`." if base_model else "Trained from local weights."
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=True)}---\n",
        f"# {model_name}\n",
        f"{_TASKS[kind]} {origin}\n",
        *([_members(router)] if router else []),
        f"## Objective\n\n`{objective}`. {sentence}\n\nPapers: {cites}.\n",
        "## Held-out results\n\n" + (heldout_table.strip() if heldout_table else "Not evaluated yet.") + "\n",
        *([f"![Score and cost of every router]({picture})\n"] if picture else []),
        _HOW + (_use(router, repo_id) if router else _loading(repo_id, base_model, adapter)) + "\n",
        _training(recipe, command, costs),
        *([_hashes(hashes)] if hashes else []),
        f"## Limits\n\n{_LIMITS.format(members='executors' if kind == 'step_routing' else 'members')}",
    ]
    return scrubbed("\n".join(parts))


def merged_card(
    card: str, *, repo_id: str | None = None, router: Mapping[str, Any] | None = None, hashes: Mapping[str, str]
) -> str | None:
    """An adapter's card, as that of the whole model which it and its base make; None: it is not one of `model_card`.

    Args: as of `model_card`, of the whole model.
    """
    _, front, text = [*card.split("---\n", 2), "", ""][:3]
    try:
        metadata, _ = read_yaml_text(front, "README.md")
    except YamlError:  # not ours
        return None
    if not isinstance(metadata, dict) or "srpo" not in (metadata.get("tags") or ()):
        return None
    router = router if router and router.get("kind") in _USES else None
    use = f"{_HOW}{_use(router, repo_id) if router else _loading(repo_id, None, False)}\n\n"
    for new in (use, _hashes(hashes) + "\n"):
        heading = new.partition("\n")[0]
        text = re.sub(rf"(?ms)^{heading}$.*?(?=^## )", new.replace("\\", r"\\"), text)
    return f"---\n{yaml.safe_dump({**metadata, 'library_name': 'transformers'}, sort_keys=True)}---\n{text}"


def _names(router: Mapping[str, Any]) -> list[str]:
    settings = router["settings"]
    return list(settings.get("executors") or [member["name"] for member in settings.get("members") or ()])


def _members(router: Mapping[str, Any]) -> str:
    what = "Executors" if router["kind"] == "step_routing" else "Members"
    return f"{what}: {', '.join(_names(router)) or 'not stated'}.\n"


def _use(router: Mapping[str, Any], repo_id: str | None) -> str:
    """Python that runs as it stands: with the Hub id anywhere, else in the card's folder."""
    use = _USES[router["kind"]].format(
        name=f'"{repo_id}"' if repo_id else '"."',
        bounds=dict.fromkeys(_names(router), 0.001),
        observation=repr(_FIRST),
    )
    where = "" if repo_id else "In this folder (or with its path in place of the dot):\n\n"
    return f"{where}```python\nfrom routers import load_router  # pip install srpo\n\n{use}\n```"


def _loading(repo_id: str | None, base_model: str | None, adapter: bool) -> str:
    repo_id = repo_id or "."  # the card's own folder
    load = [f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")']
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if adapter:
        imports = f"from peft import PeftModel\n{imports}"
        load.append(f'base = AutoModelForCausalLM.from_pretrained("{base_model or "<the base model>"}")')
        load.append(f'model = PeftModel.from_pretrained(base, "{repo_id}")')
    else:
        load.append(f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")')
    use = [
        'messages = [{"role": "user", "content": "..."}]  # the routing prompt, as in training',
        "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', "
        "return_dict=True)",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))",
    ]
    return "\n".join(["```python", imports, "", *load, *use, "```"])


def _result(result: Mapping[str, Any], task: Mapping[str, str]) -> dict[str, Any]:
    metrics = [
        {"type": name, "name": f"{result['name']}: {name}", "value": n} for name, n in result["metrics"].items()
    ]
    return {"task": dict(task), "dataset": {"type": "routing", "name": result["dataset"]}, "metrics": metrics}


def _hashes(hashes: Mapping[str, str]) -> str:
    rows = [f"| `{name}` | `{digest}` |" for name, digest in hashes.items()]
    return "\n".join(["## Hashes", "", "| | sha256 |", "|---|---|", *rows, ""])


def costs_of(records: Sequence[Mapping[str, Any]], tokens: float) -> list[str]:
    """What a training took, by its log (`trainer_state.json`)."""
    last = {name: value for record in records for name, value in record.items()}
    found = [f"{tokens:,.0f} tokens read and written" if tokens else ""]
    found.append(f"{last['train_runtime']:,.0f} s of training" if "train_runtime" in last else "")
    found.append(f"${last['cost/spent_usd']:.4f} for calls" if "cost/spent_usd" in last else "")
    return [phrase for phrase in found if phrase]


def _training(recipe: Mapping[str, Any] | None, command: Sequence[str] | None, costs: Sequence[str]) -> str:
    words = _own_command() if command is None else list(command)
    lines = ["## How it was trained", "", "```bash", shlex.join(words), "```", ""]
    if recipe:
        dumped = yaml.safe_dump(redacted(recipe), sort_keys=False, allow_unicode=True)
        lines += ["The keys that were set; the others are defaults of `SRPOConfig`:", "", "```yaml", dumped + "```"]
    else:
        lines.append("Not trained from a recipe file: the settings were given in Python.")
    took = [f"It took {', '.join(costs)}.", ""] if costs else []
    return "\n".join([*lines, "", *took, f"Versions: {_versions()}.", ""])


def _own_command() -> list[str]:
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
    if sys.argv[0].startswith("srpo "):
        return [*sys.argv[0].split(), *sys.argv[1:]]
    script = os.path.relpath(sys.argv[0]) if sys.argv[0] else "-"
    if script.startswith(os.pardir):  # somewhere else on this machine, which is nobody's business
        script = os.path.basename(script)
    return [*(["accelerate", "launch"] if launched else ["python"]), script, *sys.argv[1:]]


def _versions() -> str:
    found = []
    for name in ("srpo", "trl", "transformers", "torch", "peft", "accelerate", "datasets"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*found, f"Python {platform.python_version()}"])
