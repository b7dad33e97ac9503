"""One folder, one run: `output_dir` is refused where another run lies, until `overwrite: true` takes away its files.

A run says in `run.json` which recipe it follows and whether it has finished. Then a folder
    holds nothing that runs write       a new run starts
    holds a run that did not finish     the same recipe goes on; from a checkpoint, where there are any;
                                        any recipe, where it had made nothing yet
    holds another run, or a finished    refused; `resume_from_checkpoint` goes on, `overwrite: true` starts afresh
    holds such files, but no run's      refused, always: nobody's files are written over

Emptying takes away files by the names that runs give them and folders that are then empty, never anything else; it
follows no symbolic link, and refuses /, the home and working directories and those above them, and git repositories.
Only the main process acts; the others wait, and end with its words.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from srpo.derived import made_from
from srpo.recipe import Recipe, RecipeError, resolved_recipe
from srpo.steps import checkpoint_step

RUN = "run.json"
RECIPE = "recipe.yaml"
# Names that our scripts, TRL, transformers, peft, accelerate and DeepSpeed give to what they write into a folder.
_FILES = """
run.json run.json.draft recipe.yaml README.md quarantine*.jsonl made_from.json episodes.parquet.made_from.json
evaluation.json agent_evaluation.json frontier.png agent.yaml step_router.yaml episodes.parquet tables.md
profiles.parquet profiles.parquet.draft spending_*.json spending_*.draft teacher.safetensors config.json
generation_config.json adapter_config.json *_results.json trainer_state.json training_args.bin tokenizer.json
tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
spiece.model chat_template.jinja processor_config.json preprocessor_config.json model.safetensors
model-*-of-*.safetensors model.safetensors.index.json pytorch_model*.bin pytorch_model.bin.index.json
adapter_model.safetensors adapter_model.bin
""".split()
# The same of the folders below.
_FILES_BELOW = """
*made_from.json profiles_*.parquet rules_*.parquet *.parquet.partial *.parquet.draft rules_*.partial runs.partial
settings.json parts.json completions_*.parquet train.parquet rollouts_*.safetensors environment_*.json optimizer.pt
optimizer.bin scheduler.pt scheduler.bin scaler.pt rng_state*.pth random_states_*.pkl latest zero_to_fp32.py
*_states.pt *.distcp .metadata events.out.tfevents.*
""".split()
_FOLDERS = """
checkpoint-* tmp-checkpoint-* completions additional_completions warm_start bosft bosft_evaluation demonstrations task
base unseen cost_weight_* runs global_step* pytorch_model_fsdp_* optimizer_* ref teacher
""".split()
# Keys that may change between two starts of one run: they say how it is watched, paid and spread, not what it is.
_NEUTRAL = """
resume_from_checkpoint overwrite max_cost_usd report_to run_name project disable_tqdm push_to_hub hub_* save_*
logging_* log_* concurrency profile_workers reply_cache dataloader_* trackio_* include_num_input_tokens_seen
""".split()
_LONGER = ("max_steps", "num_train_epochs")


class FolderTaken(ValueError):
    """`output_dir` holds something that this run must not write over; says what, and what to do."""


@dataclass
class RunArguments:
    """What a script may do with its output folder."""

    overwrite: bool = field(
        default=False, metadata={"help": "Take away what an earlier run wrote into output_dir, and start afresh."}
    )


def claim(recipe: Recipe, output_dir: str | Path, *, overwrite: bool = False, resume: str | None = None) -> Path:
    """Take the output folder for a run, with `recipe.yaml` and `run.json` in it, and return it. All ranks call this.

    Args:
        recipe: as `load_recipe` returned it.
        overwrite: of `RunArguments`.
        resume: `resume_from_checkpoint`.

    Raises:
        FolderTaken: on every rank, in the words of the main process.
        RecipeError: `overwrite` together with `resume`.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if overwrite and resume is not None:
        raise RecipeError("overwrite: true takes away what resume_from_checkpoint goes on from: give one of the two")
    state, words = PartialState(), [None]
    if state.is_main_process:
        try:
            _claim(recipe, Path(output_dir), overwrite, None if resume is None else Path(resume))
        except (ValueError, OSError) as error:
            words = [str(error)]  # type: ignore[list-item]
    if state.num_processes > 1:
        broadcast_object_list(words)
    if words[0] is not None:
        raise FolderTaken(words[0])
    return Path(output_dir)


def finish(output_dir: str | Path) -> None:
    """The run has ended well, and its folder is now refused to others. The main process writes; all may call this."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        path = Path(output_dir) / RUN
        run = json.loads(path.read_text(encoding="utf-8"))
        if "resumed_with" in run:
            run["recipe"] = run.pop("resumed_with")
            (path.parent / RECIPE).write_text(yaml.safe_dump(run["recipe"], sort_keys=False), encoding="utf-8")
        _write(path, {**run, "finished": _now()})


def _claim(recipe: Recipe, folder: Path, overwrite: bool, resume: Path | None) -> None:
    if folder.exists() and not folder.is_dir():
        raise FolderTaken(f"output_dir {folder} is a file")
    step = None if resume is None else checkpoint_step(resume)
    if overwrite:
        _refuse_to_empty(folder)
    there = sorted(name.name for name in folder.iterdir() if _is_ours(name)) if folder.is_dir() else []
    then = _run_of(folder)
    given = resolved_recipe(recipe)
    given.pop("overwrite", None)  # of this start; whoever starts from the written recipe says it again
    if there and then is None:
        raise FolderTaken(
            f"output_dir {folder} holds {', '.join(there[:3])}{', ...' if there[3:] else ''}, which no run of these "
            "scripts wrote and a run would write over: choose another output_dir, or move them away"
        )
    if there and then is not None:
        if overwrite:
            _empty(folder, recipe)
        elif resume is not None and resume.resolve().parent == folder.resolve():
            _go_on(recipe, folder, then, int(step or 0))
            # The recipe is written over once the run has finished: until then the folder is what it was.
            _write(folder / RUN, {**then, "resumed_with": made_from(**given), "resumed": _now()})
            return
        else:
            _refuse_another(recipe, folder, then)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    _write(folder / RUN, {"recipe": made_from(**given), "started": _now(), "finished": None})


def _refuse_another(recipe: Recipe, folder: Path, then: Mapping[str, Any]) -> None:
    """Raise unless the folder's run is this one, stopped before its first checkpoint."""
    changed = _changed(recipe, then)
    checkpoints = _checkpoints(folder)
    if not then["finished"] and not checkpoints and (not changed or _has_made_nothing(folder)):
        return
    what = "a finished run" if then["finished"] else "a run that did not finish"
    differs = f" with another {', '.join(changed[:3])}" if changed else ""
    resume = f"resume_from_checkpoint: {checkpoints[max(checkpoints)]} to go on, " if checkpoints else ""
    raise FolderTaken(
        f"output_dir {folder} holds {what}{differs}: {resume}another output_dir to keep it, or overwrite: true to "
        "take away what it wrote and start afresh"
    )


def _has_made_nothing(folder: Path) -> bool:
    """Whether a run was stopped by a mistake in its recipe or data: the next attempt may say something else."""
    told = (RUN, RECIPE, "quarantine*.jsonl")
    return all(any(fnmatch(path.name, name) for name in told) for path in folder.iterdir() if _is_ours(path))


def _go_on(recipe: Recipe, folder: Path, then: Mapping[str, Any], step: int) -> None:
    most = recipe.given.get("max_steps", -1)
    if 0 < most < step:
        raise FolderTaken(f"resume_from_checkpoint is of step {step}, and max_steps is {most}: raise max_steps")
    later = [str(path) for number, path in sorted(_checkpoints(folder).items()) if number > step]
    if later:
        raise FolderTaken(
            f"resume_from_checkpoint is of step {step}, and {folder} also holds {', '.join(later)}: resume from the "
            "last one, or move the later ones away"
        )
    changed = [key for key in _changed(recipe, then) if key not in _LONGER]
    if changed:
        now = {**resolved_recipe(recipe)}
        words = ", ".join(f"{key}: {then['recipe'].get(key)!r} -> {now.get(key)!r}" for key in changed)
        print(f"WARNING: the resumed run goes on with another recipe than it began with: {words}", flush=True)
    # What was logged after the checkpoint is undone: a shorter continuation would leave it beside its own.
    for path in folder.glob("completions/completions_*.parquet"):
        number = re.fullmatch(r"completions_(\d+)\.parquet", path.name)
        if number and int(number[1]) > step and not path.is_symlink() and not path.parent.is_symlink():
            path.unlink()


def _changed(recipe: Recipe, then: Mapping[str, Any]) -> list[str]:
    now, before = made_from(**resolved_recipe(recipe)), then["recipe"]
    keys = {key for key in {*now, *before} if now.get(key) != before.get(key)}
    return sorted(key for key in keys if not any(fnmatch(key, pattern) for pattern in _NEUTRAL))


def _run_of(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says; of a run before there was one: its recipe, finished. None: no run of ours."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if isinstance(found.get("recipe"), dict):
            return {"finished": None, **found}
    except (OSError, ValueError, AttributeError):
        pass
    try:
        recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    if not isinstance(recipe, dict) or "output_dir" not in recipe:
        return None
    return {"recipe": made_from(**{str(key): value for key, value in recipe.items()}), "finished": "unknown"}


def _checkpoints(folder: Path) -> dict[int, Path]:
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in named if match and path.is_dir()}


def _is_ours(path: Path, below: bool = False) -> bool:
    if path.is_dir() and not path.is_symlink():
        return any(fnmatch(path.name, pattern) for pattern in _FOLDERS)
    links = _FOLDERS if path.is_symlink() else []
    return any(fnmatch(path.name, pattern) for pattern in (*_FILES, *(_FILES_BELOW if below else ()), *links))


# ------------------------------------------------------------------------------------------------------- emptying


def _refuse_to_empty(folder: Path) -> None:
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


def _empty(folder: Path, recipe: Recipe) -> None:
    """Take away what runs write; first everything is looked at, so that a refusal leaves the folder as it was."""
    found = list(_walk(folder))
    files, folders = [p for p in found if not p.is_dir()], [p for p in found if p.is_dir()]
    inside = [file.resolve() for file in files if file.name != RECIPE or file.parent != folder]
    for key, path in _paths(recipe):
        if any(path == file or path in file.parents for file in inside):
            raise FolderTaken(
                f"overwrite: true would take away what {key} names, {path}: choose another output_dir, or move that"
            )
    for file in files:
        file.unlink()
    for place in folders:  # the innermost come first
        if not any(place.iterdir()):
            place.rmdir()
    if left := sorted(path.name for path in folder.iterdir()):
        print(f"{folder}: kept, since no run writes it: {', '.join(left)}", flush=True)


def _walk(folder: Path, below: bool = False) -> Iterator[Path]:
    """Files that runs write, in folders that runs make. Raises FolderTaken for a symbolic link by such a name."""
    for entry in sorted(folder.iterdir()):
        of_tensorboard = folder.name == "runs" and entry.is_dir()  # which it names itself
        if not _is_ours(entry, below) and not of_tensorboard:
            continue
        if entry.is_symlink():
            raise FolderTaken(f"overwrite: true is refused: {entry} is a symbolic link, which no run makes")
        if entry.is_dir():
            yield from _walk(entry, below=True)
        yield entry


def _paths(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """Existing files and folders that the recipe names, with their keys."""
    for key, value in recipe.given.items():
        for word in value if isinstance(value, (list, tuple)) else [value]:
            if key != "output_dir" and isinstance(word, str) and word and Path(word).exists():
                yield key, Path(word).resolve()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _write(path: Path, document: Mapping[str, Any]) -> None:
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
