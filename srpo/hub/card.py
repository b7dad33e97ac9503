"""The model card of a trained router: what was optimised, from which recipe, how well it does, how to load it."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from srpo.redact import redacted, scrubbed

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

_LIMITS = """\
- The policy knows the members of the pool it was trained with, at the prices it was trained with. Evaluate again when
  either changes.
- It chooses a member; it does not check that member's reply. Replies are untrusted text.
- Rewards were computed by programs; what they do not measure was not optimised.
"""


def model_card(
    *,
    objective: str,
    model_name: str,
    base_model: str | None = None,
    adapter: bool = False,
    repo_id: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    heldout_table: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Markdown with the Hub's YAML metadata in front.

    Args:
        objective: grpo, sdpo, srpo or bopo.
        model_name: heading of the card.
        base_model: Hub id of the model that was trained; None when it was made from nothing or is a local folder.
        adapter: the weights are a PEFT adapter and need `base_model`.
        repo_id: where it is pushed to, for the loading example.
        recipe: the keys that were set; secrets are redacted here once more.
        command: words of the command line; None: this process's, with paths below the working directory relative.
        heldout_table: a markdown table of held-out results.
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
    if base_model:
        metadata["base_model"] = base_model
    if dataset_name:
        metadata["datasets"] = dataset_name

    cites = ", ".join(f"[{name}, arXiv:{_PAPERS[name]}](https://arxiv.org/abs/{_PAPERS[name]})" for name in papers)
    origin = f"Trained from `{base_model}`." if base_model else "Trained from local weights."
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=True)}---\n",
        f"# {model_name}\n",
        "A routing policy: it reads a query and the descriptions of a pool of models, and decides which of them "
        f"answers. {origin}\n",
        f"## Objective\n\n`{objective}`. {sentence}\n\nPapers: {cites}.\n",
        "## Held-out results\n\n" + (heldout_table.strip() if heldout_table else "Not evaluated yet.") + "\n",
        "## How to load it\n\n" + _loading(repo_id or model_name, base_model, adapter) + "\n",
        _training(recipe, command),
        f"## Limits\n\n{_LIMITS}",
    ]
    return scrubbed("\n".join(parts))


def _loading(repo_id: str, base_model: str | None, adapter: bool) -> str:
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


def _training(recipe: Mapping[str, Any] | None, command: Sequence[str] | None) -> str:
    words = _own_command() if command is None else list(command)
    lines = ["## How it was trained", "", "```bash", shlex.join(words), "```", ""]
    if recipe:
        dumped = yaml.safe_dump(redacted(recipe), sort_keys=False, allow_unicode=True)
        lines += ["The keys that were set; the others are defaults of `SRPOConfig`:", "", "```yaml", dumped + "```"]
    else:
        lines.append("Not trained from a recipe file: the settings were given in Python.")
    return "\n".join([*lines, "", f"Versions: {_versions()}.", ""])


def _own_command() -> list[str]:
    launched = any(name.startswith("ACCELERATE_") for name in os.environ)
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
