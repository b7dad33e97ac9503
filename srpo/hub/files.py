"""What goes up to the Hub: a policy, as its users load it; and, in a folder of their own, whole checkpoints.

An output folder also holds the warm start, a base model, tables, ledgers, rollouts and other checkpoints, and every
new file would be public until somebody thought of leaving it out. So what is uploaded is named here, and nothing else.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from srpo.run.derived import MADE_FROM
from srpo.run.files import RUN
from srpo.run.whole import MANIFEST, fault, matches

ROUTER, CARD, PICTURE = "router.yaml", "README.md", "frontier.png"
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
LOADED = (
    *_WEIGHTS,
    *("model*.safetensors.index.json", "pytorch_model*.bin.index.json", "config.json", "generation_config.json"),
    *("adapter_config.json", "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "chat_template*"),
    *("*processor_config.json", "*.py"),  # code of a model that is not part of transformers
    ROUTER,
)
"""Files at the top of a policy's folder, which loading it reads."""
POLICY = (*LOADED, CARD, "LICENSE*", "NOTICE*", "recipe.yaml", PICTURE)
"""These, and what tells of it: how it was made, and the picture of the card."""
_POLICY_BELOW = ("additional_chat_templates/*.jinja",)
# Of a checkpoint: pickles (training_args.bin holds the token if one was passed), other checkpoints, local records.
_LOCAL_ONLY = (
    *("_*", "checkpoint-*", "training_args.bin", "runs/*", "wandb/*", "completions/*"),
    *("quarantine*.jsonl", "losses.jsonl", "checked/*"),
)


def changed(folder: Path, only: Iterable[str] = POLICY) -> str | None:
    """Why a folder with a manifest does not hold what was written, and what to do; None: it does, or has no manifest.

    Args:
        only: as in `srpo.run.whole.fault`.
    """
    if not (folder / MANIFEST).is_file() or (why := fault(folder, only)) is None:
        return None
    # A checkpoint without its manifest could not be resumed.
    mine = (folder / RUN).is_file() or (folder / MADE_FROM).is_file()
    return f"{why}. If that was you, delete {MANIFEST} there" if mine else why


def files_to_push(folder: str | os.PathLike[str], resumable: bool = False, beside: Iterable[str] = ()) -> list[str]:
    """Paths in `folder`, relative to it and sorted.

    Args:
        resumable: of a checkpoint, all that resuming needs too.
        beside: names of further files that belong to the policy.

    Raises:
        ValueError: there are no weights of a policy, or it is a checkpoint that is not whole.
    """
    root = Path(folder)
    resumable = resumable and not (root / RUN).is_file()  # OUTPUT itself, which is no checkpoint
    if (why := changed(root, () if resumable else POLICY)) is not None:
        raise ValueError(f"{folder} cannot be pushed: {why}")
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    if resumable:
        return [name for name in found if not matches(name, _LOCAL_ONLY)]
    top = [name for name in found if "/" not in name]
    if not any(matches(name, _WEIGHTS) for name in top):
        raise ValueError(
            f"{folder} holds no weights of a policy (model*.safetensors or adapter_model*.safetensors): name a folder "
            "that a run saved its policy into"
        )
    own = {*beside}
    return [name for name in found if name in own or matches(name, POLICY if "/" not in name else _POLICY_BELOW)]
