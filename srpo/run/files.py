"""What runs write into a folder, by name, and taking it away: `overwrite: true` of `srpo.run.folder`.

Emptying takes away files by the names that runs give them and folders that are then empty, never anything else; it
follows no symbolic link, and refuses /, the home and working directories and those above them, and git repositories.
"""

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from srpo.run.processes import Refused

RUN = "run.json"
RECIPE = "recipe.yaml"
EVALUATION = "evaluation.parquet"
VALIDATION = "validation.json"
"""The ids of the items on which the best checkpoint is chosen."""
CHECKED = "checked"
"""Folder of what was found before a run took the place of another: quarantine files, until then."""
# Names that our scripts, TRL, transformers, peft, accelerate and DeepSpeed give to what they write into a folder.
_FILES = """
run.json run.json.draft recipe.yaml README.md quarantine*.jsonl losses.jsonl leaks.json validation.json manifest.json
manifest.json.draft made_from.json *.made_from.json evaluation.parquet report.html report.md frontier.png router.yaml
profiles.parquet profiles.parquet.draft spending_*.json spending_*.draft teacher.safetensors config.json
generation_config.json adapter_config.json *_results.json trainer_state.json training_args.bin tokenizer.json
tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
spiece.model chat_template.jinja processor_config.json preprocessor_config.json model.safetensors
model-*-of-*.safetensors model.safetensors.index.json pytorch_model*.bin pytorch_model.bin.index.json
adapter_model.safetensors adapter_model.bin
""".split()
# The same of the folders below.
_FILES_BELOW = """
*made_from.json profiles_*.parquet rules_*.jsonl *.parquet.partial *.parquet.draft runs.partial
settings.json parts.json manifest.json manifest.json.draft step_*.jsonl
completions_*.parquet train.parquet rollouts_*.safetensors environment_*.json optimizer.pt
optimizer.bin scheduler.pt scheduler.bin scaler.pt rng_state*.pth random_states_*.pkl latest zero_to_fp32.py
*_states.pt *.distcp .metadata events.out.tfevents.*
""".split()
_FOLDERS = """
checkpoint-* tmp-checkpoint-* _saving old-checkpoint-* bad_steps
completions additional_completions start demonstrations task base runs checked
global_step* pytorch_model_fsdp_* optimizer_* ref teacher
""".split()


class FolderTaken(Refused):
    """`output_dir` holds something that this run must not write over; says what, and what to do."""


def is_ours(path: Path, below: bool = False) -> bool:
    """Whether runs give such a name to such a thing, in their folder or (`below`) in one within it."""
    if path.is_dir() and not path.is_symlink():
        return any(fnmatch(path.name, pattern) for pattern in _FOLDERS)
    links = _FOLDERS if path.is_symlink() else []
    return any(fnmatch(path.name, pattern) for pattern in (*_FILES, *(_FILES_BELOW if below else ()), *links))


def refuse_to_empty(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Raise FolderTaken where emptying would reach too far, or take what the recipe (its given keys) reads."""
    real, here, home = folder.resolve(), Path.cwd().resolve(), Path.home().resolve()
    why = None
    if folder.is_symlink():
        why = "is a symbolic link"
    elif any(real == place or real in place.parents for place in (here, home)):
        why = "is or holds the working directory or your home"
    elif (real / ".git").exists() or (real / "HEAD").exists():
        why = "holds a git repository"
    if why is not None:
        raise FolderTaken(f"overwrite: true is refused, because output_dir {folder} {why}: name a folder of its own")
    found = _walk(folder) if folder.is_dir() else ()
    inside = [path.resolve() for path in found if not path.is_dir() and path != folder / RECIPE]
    for key, path in _paths(recipe):
        if any(path == file or path in file.parents for file in inside):
            raise FolderTaken(
                f"overwrite: true would take away what {key} names, {path}: choose another output_dir, or move that"
            )


def empty(folder: Path, keep: Path) -> None:
    """Take away what runs write. `refuse_to_empty` comes first, so that a refusal leaves the folder as it was.

    Args:
        keep: a folder in it that stays.
    """
    found = [path for path in _walk(folder) if keep == folder or keep not in (path, *path.parents)]
    marks = (folder / RECIPE, folder / RUN)  # last: what is interrupted in the middle is still a run's folder
    for file in sorted((path for path in found if not path.is_dir()), key=lambda path: path in marks):
        file.unlink()
    for place in (path for path in found if path.is_dir()):  # the innermost come first
        if not any(place.iterdir()):
            place.rmdir()
    if left := sorted(path.name for path in folder.iterdir() if path != keep):
        print(f"{folder}: kept, since no run writes it: {', '.join(left)}", flush=True)


def _walk(folder: Path, below: bool = False) -> Iterator[Path]:
    """Files that runs write, in folders that runs make. Raises FolderTaken for a symbolic link by such a name."""
    for entry in sorted(folder.iterdir()):
        of_tensorboard = folder.name == "runs" and entry.is_dir()  # which it names itself
        if not is_ours(entry, below) and not of_tensorboard:
            continue
        if entry.is_symlink():
            raise FolderTaken(f"overwrite: true is refused: {entry} is a symbolic link, which no run makes")
        if entry.is_dir():
            yield from _walk(entry, below=True)
        yield entry


def _paths(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Existing files and folders that the recipe names, with their keys."""
    for key, value in recipe.items():
        for word in value if isinstance(value, (list, tuple)) else [value]:
            if key != "output_dir" and isinstance(word, str) and word and Path(word).exists():
                yield key, Path(word).resolve()


def clear_notes(folder: Path) -> None:
    """Take away what an earlier attempt noted of its data: it would accuse this one's rows."""
    for path in _notes(folder):
        path.unlink()


def move_notes(source: Path, folder: Path) -> None:
    """Bring notes to the run that they are of, and remove the folder where they waited."""
    for path in _notes(source):
        path.replace(folder / path.name)
        print(f"{path} is now {folder / path.name}", flush=True)
    if source.is_dir() and not any(source.iterdir()):
        source.rmdir()


def _notes(folder: Path) -> list[Path]:
    found = [*folder.glob("quarantine*.jsonl"), *folder.glob("leaks.json")]
    return [path for path in found if is_note(path) and not path.is_symlink()]


def is_note(path: Path) -> bool:
    """Whether a file is called as what runs note of their data: quarantine files, and what leaks."""
    return re.fullmatch(r"quarantine(_table|_(train|heldout)(_\d+)?)?\.jsonl|leaks\.json", path.name) is not None
