"""One folder, one run: `output_dir` is refused where another run lies, until `overwrite: true` takes away its files.

A run says in `run.json` which recipe it follows and whether it has finished. Then a folder
    holds nothing that runs write       a new run starts
    holds a run that did not finish     the same recipe goes on; from a checkpoint, where there are any;
                                        any recipe, where it had made nothing yet
    holds another run, or a finished    refused; `resume_from_checkpoint` goes on, `overwrite: true` starts afresh
    holds such files, but no run's      refused, always: nobody's files are written over

`claim` only looks, so that a mistake in recipe, data or model leaves the earlier run as it was; `Claim.take`, when
all of them have been checked, empties the folder and says whose it is now. Only the main process acts; the others
wait, and end with its words.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from srpo.recipe import Recipe, RecipeError, resolved_recipe
from srpo.run.derived import made_from
from srpo.run.files import (
    CHECKED,
    RECIPE,
    RUN,
    FolderTaken,
    clear_notes,
    empty,
    is_note,
    is_ours,
    move_notes,
    refuse_to_empty,
)
from srpo.run.processes import main_process
from srpo.run.steps import checkpoint_step
from srpo.run.whole import fault, whole_looking
from srpo.strict_yaml import YamlError, read_yaml

# Keys that may change between two starts of one run: they say how it is watched, paid and spread, not what it is.
_NEUTRAL = """
resume_from_checkpoint overwrite max_cost_usd report_to run_name project disable_tqdm push_to_hub hub_* save_*
logging_* log_* concurrency profile_workers reply_cache dataloader_* trackio_* include_num_input_tokens_seen
vllm_server_* signal_deadline
""".split()
_LONGER = ("max_steps", "num_train_epochs")


@dataclass
class Claim:
    """A folder that a run may take; nothing in it has changed yet, but for what `notes` holds."""

    recipe: Recipe
    folder: Path
    overwrite: bool
    resume: Path | None
    notes: Path
    """Where bad rows are written until the run begins: the folder, or one in it while an earlier run lies there."""
    _taken: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether the run resumes in the folder of its checkpoint."""
        return self.resume is not None and self.resume.resolve().parent == self.folder.resolve()

    def take(self) -> Path:
        """Begin: empty the folder or undo what was logged after the checkpoint, as the recipe says, and write
        `recipe.yaml` and `run.json`. All ranks call this; a second call does nothing.

        Raises:
            FolderTaken: as `claim`, where somebody else has taken the folder since.
        """
        if not self._taken:
            main_process(self._take, FolderTaken)
        self._taken = True
        return self.folder

    def _take(self) -> None:
        given, then = _given(self.recipe), _look(self)
        if then is not None and self.resume is not None and self.goes_on:
            _warn_of_changes(self.recipe, then)
            _undo_after(self.folder, checkpoint_step(self.resume))
            # The recipe is written over once the run has finished: until then the folder is what it was.
            _write(self.folder / RUN, {**then, "resumed_with": made_from(**given), "resumed": _now()})
        else:
            if self.overwrite and then is not None:
                empty(self.folder, keep=self.notes)
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / RUN, {"recipe": made_from(**given), "started": _now(), "finished": None})
            (self.folder / RECIPE).write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
        if self.notes != self.folder:
            clear_notes(self.folder)
            move_notes(self.notes, self.folder)


def claim(recipe: Recipe, output_dir: str | Path, *, overwrite: bool = False, resume: str | None = None) -> Claim:
    """Look whether a run may have the output folder. All ranks call this, and then `Claim.take`.

    Args:
        recipe: as `load_recipe` returned it.
        overwrite: of `srpo.task.RunArguments`.
        resume: `resume_from_checkpoint`.

    Raises:
        FolderTaken: on every rank, in the words of the main process.
        RecipeError: `overwrite` together with `resume`.
    """
    if overwrite and resume is not None:
        raise RecipeError("overwrite: true takes away what resume_from_checkpoint goes on from: give one of the two")
    folder = Path(output_dir)
    found = Claim(recipe, folder, overwrite, None if resume is None else Path(resume), folder)

    def look() -> str:
        then = _look(found)
        if then is not None and not _has_made_nothing(folder):
            found.notes = folder / CHECKED
        clear_notes(found.notes)
        return str(found.notes)

    found.notes = Path(main_process(look, FolderTaken))
    return found


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


def _given(recipe: Recipe) -> dict[str, Any]:
    given = resolved_recipe(recipe)
    given.pop("overwrite", None)  # of this start; whoever starts from the written recipe says it again
    return given


def _look(wanted: Claim) -> dict[str, Any] | None:
    """The run that lies in the folder, which `wanted` may go on with or take away. Raises where it may not."""
    folder, resume = wanted.folder, wanted.resume
    if folder.exists() and not folder.is_dir():
        raise FolderTaken(f"output_dir {folder} is a file")
    step = None if resume is None else checkpoint_step(resume)
    if wanted.overwrite:
        refuse_to_empty(folder, wanted.recipe.given)
    there = sorted(path for path in folder.iterdir() if is_ours(path)) if folder.is_dir() else []
    then = run_of(folder)
    if then is None:
        # What a mistake was told with lies there alone: the run that would have followed never began.
        names = [path.name for path in there if not is_note(path) and path.name != CHECKED]
        if names:
            raise FolderTaken(
                f"output_dir {folder} holds {', '.join(names[:3])}{', ...' if names[3:] else ''}, which no run of "
                "these scripts wrote and a run would write over: choose another output_dir, or move them away"
            )
    elif wanted.goes_on:
        _check_going_on(wanted.recipe, folder, int(step or 0))
    elif not wanted.overwrite:
        _refuse_another(wanted.recipe, folder, then)
    return then


def _refuse_another(recipe: Recipe, folder: Path, then: Mapping[str, Any]) -> None:
    """Raise unless the folder's run is this one, stopped before its first checkpoint."""
    changed = _changed(recipe, then)
    checkpoints = whole_looking(folder)
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
    return all(path.name in (RUN, RECIPE, CHECKED) or is_note(path) for path in folder.iterdir() if is_ours(path))


def _check_going_on(recipe: Recipe, folder: Path, step: int) -> None:
    most = recipe.given.get("max_steps", -1)
    if 0 < most < step:
        raise FolderTaken(f"resume_from_checkpoint is of step {step}, and max_steps is {most}: raise max_steps")
    later = [str(path) for number, path in whole_looking(folder).items() if number > step and fault(path) is None]
    if later:
        raise FolderTaken(
            f"resume_from_checkpoint is of step {step}, and {folder} also holds {', '.join(later)}: resume from the "
            "last one, or move the later ones away"
        )


def _warn_of_changes(recipe: Recipe, then: Mapping[str, Any]) -> None:
    changed = [key for key in _changed(recipe, then) if key not in _LONGER]
    if changed:
        now = {**resolved_recipe(recipe)}
        words = ", ".join(f"{key}: {then['recipe'].get(key)!r} -> {now.get(key)!r}" for key in changed)
        print(f"WARNING: the resumed run goes on with another recipe than it began with: {words}", flush=True)


def _undo_after(folder: Path, step: int) -> None:
    """What was logged after the checkpoint: a shorter continuation would leave it beside its own."""
    for path in folder.glob("completions/completions_*.parquet"):
        number = re.fullmatch(r"completions_(\d+)\.parquet", path.name)
        if number and int(number[1]) > step and not path.is_symlink() and not path.parent.is_symlink():
            path.unlink()


def _changed(recipe: Recipe, then: Mapping[str, Any]) -> list[str]:
    now, before = made_from(**resolved_recipe(recipe)), then["recipe"]
    keys = {key for key in {*now, *before} if now.get(key) != before.get(key)}
    return sorted(key for key in keys if not any(fnmatch(key, pattern) for pattern in _NEUTRAL))


def run_of(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says; of a run before there was one: its recipe, finished. None: no run of ours."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if isinstance(found.get("recipe"), dict):
            return {"finished": None, **found}
    except (OSError, ValueError, AttributeError):
        pass
    try:
        recipe = read_yaml(folder / RECIPE)
    except (OSError, YamlError):
        return None
    if not isinstance(recipe, dict) or "output_dir" not in recipe:
        return None
    return {"recipe": made_from(**{str(key): value for key, value in recipe.items()}), "finished": "unknown"}


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _write(path: Path, document: Mapping[str, Any]) -> None:
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
