"""Publishing on the Hugging Face Hub, under one rule: whatever goes wrong there is told in words and training goes on.

TRL's trainers contact the Hub when they are constructed, at every save and at the end, and an error there ends the
run, as silence holds it up. [`HubMixin`], placed before the trainer's class, keeps the arguments and strategies
(`push_to_hub`, `hub_model_id`, `hub_strategy`, ...) and replaces those calls by `srpo push` in processes of their own
(`srpo.hub.jobs`). Saving itself stays outside the rule: a full disk is not the Hub's fault.
"""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from srpo.hub.card import costs_of, model_card
from srpo.hub.files import CARD, PICTURE, ROUTER, files_to_push
from srpo.hub.jobs import Push, Pushes, push_of, repository, run
from srpo.run.processes import main_process_long
from srpo.run.whole import MANIFEST, read_manifest, seal, sha256_of
from srpo.strict_yaml import read_yaml

logger = logging.getLogger(__name__)

_STAGING = "_hub"  # what is pushed leaves out names that begin with "_"
_FIRST = 30.0
"""Seconds that the Hub has at the start of a run, where nothing is pushed yet."""
_BEFORE_THE_END = 5.0
"""Seconds of `signal_deadline` that are left to the process when it stops waiting for a push."""


class HubMixin:
    """Makes a `transformers.Trainer` subclass survive the Hub. Put it first: `class T(HubMixin, GRPOTrainer)`.

    `save_beside` is that of `srpo.trainer.trainer`. Reads, where the trainer has them: `objective` (str), `recipe`
    (dict or None), `heldout_table` (markdown or None), `heldout_results` (as `results` of `srpo.hub.card.model_card`).
    """

    hub_model_id: str | None
    push_in_progress: Any
    args: Any
    model: Any
    state: Any
    callback_handler: Any
    control: Any
    processing_class: Any
    save_beside: Callable[[Path], object] | None
    end_on_signal: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository; where that fails, the first push tries again."""
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        self.push_in_progress = Pushes(self.args.output_dir)
        self.hub_model_id = repository(self.args)
        self._say_if_the_base_stays_here()
        made, why = run(self._a_push(self.args.output_dir, "--create", token=token, private=private, deadline=_FIRST))
        if made is None:
            logger.warning(
                "The repository %s is not there yet: %s. Training goes on, and the first push tries again",
                self.hub_model_id,
                why,
            )
        self.hub_model_id = made or self.hub_model_id

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> None:
        """Writes README.md into the output folder (see [`srpo.hub.card.model_card`])."""
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        output_dir = Path(self.args.output_dir)
        own_tags = [tags] if isinstance(tags, str) else list(tags or ())
        source = getattr(self.model.config, "_name_or_path", None)
        card = model_card(
            objective=getattr(self, "objective", "grpo"),
            model_name=model_name or output_dir.name,
            base_model=source if source and not os.path.isdir(source) else None,
            adapter=hasattr(self.model, "peft_config"),
            repo_id=self.hub_model_id if "/" in (self.hub_model_id or "") else None,
            recipe=getattr(self, "recipe", None),
            heldout_table=getattr(self, "heldout_table", None),
            results=getattr(self, "heldout_results", ()),
            costs=costs_of(self.state.log_history, self.state.num_input_tokens_seen),
            **beside_card(output_dir),
            dataset_name=dataset_name,
            tags=own_tags,
        )
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / CARD).write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> bool:
        """Saves the model and uploads the output folder. Arguments as in `Trainer.push_to_hub`.

        Returns:
            Whether it is on the Hub, verified, on every process; always True with `blocking=False`, where a failure
            is told later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # type: ignore[attr-defined]  # all ranks take part

        def push() -> bool:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            self.create_model_card(**{"model_name": (self.args.hub_model_id or "").split("/")[-1] or None} | card)
            options = (f"--message={commit_message or 'Upload model'}",)
            one = self._a_push(self.args.output_dir, *options, token=token, revision=revision, private=private)
            if blocking:
                return self.push_in_progress.now(one) is not None
            self.push_in_progress.later(one)
            return True

        return bool(main_process_long(push))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not (Path(checkpoint_folder) / MANIFEST).is_file():
            return  # transformers calls this before all of it is written; the trainer does when it is whole
        strategy = str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy))
        if not self.is_world_process_zero() or strategy == "end":  # type: ignore[attr-defined]
            return
        if not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        staged = self._stage(checkpoint_folder)
        pushes = [self._a_push(checkpoint_folder, f"--message={message}", staged=staged)]
        if strategy in ("checkpoint", "all_checkpoints"):
            name = "last-checkpoint" if strategy == "checkpoint" else Path(checkpoint_folder).name
            options = (f"--message={message}, checkpoint", f"--into={name}")
            pushes.append(self._a_push(checkpoint_folder, *options, staged=staged))
        for push in pushes:
            last = push is pushes[-1]
            self.push_in_progress.later(push, partial(shutil.rmtree, staged, ignore_errors=True) if last else None)

    def _finish_current_push(self) -> None:
        """Called at the end of a training. A process that was asked to end does not wait longer than it may."""
        pushes = getattr(self, "push_in_progress", None)  # of the main process, of a run that pushes
        if pushes is not None:
            left = self.end_on_signal.signals.left() - _BEFORE_THE_END
            if not pushes.wait_until_done(None if left == math.inf else max(left, 0.0)):
                logger.warning("A push is left where it is, because the process has to end; srpo push finishes it")

    def _a_push(self, folder: str, *options: str, **how: Any) -> Push:
        """As `srpo.hub.jobs.push_of`."""
        step = self.state.global_step if hasattr(self, "state") else 0  # none yet when the trainer is made
        repo_id = str(self.hub_model_id)
        return push_of(self.args, repo_id, folder, *options, also=self._names_beside(), step=step, **how)

    def _stage(self, checkpoint_folder: str) -> str:
        """Hard links to the checkpoint's files: the upload survives the deletion of old checkpoints, at no cost."""
        source = Path(checkpoint_folder)
        staged = Path(self.args.output_dir) / _STAGING / source.name
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(source, staged, copy_function=_link_or_copy)
        card = Path(self.args.output_dir) / CARD
        if card.is_file():
            shutil.copy(card, staged / CARD)
        # What goes up is whole by itself: it lacks what stays here, and has the run's card.
        known = read_manifest(source)
        (staged / MANIFEST).unlink()
        names = files_to_push(staged, resumable=True)
        for path in [path for path in staged.rglob("*") if path.is_file()]:
            if path.relative_to(staged).as_posix() not in names:
                path.unlink()
        seal(staged, {name: entry for name, entry in known.items() if name != CARD})
        return str(staged)

    def _names_beside(self) -> list[str]:
        """What `save_beside` writes belongs to the policy, whatever its name."""
        if self.save_beside is None:
            return []
        with tempfile.TemporaryDirectory() as folder:
            self.save_beside(Path(folder))
            return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())

    def _say_if_the_base_stays_here(self) -> None:
        adapters = getattr(self.model, "peft_config", {}).values()
        for base in {str(config.base_model_name_or_path) for config in adapters}:
            if os.path.isdir(base):
                logger.warning(
                    "An adapter is pushed without the model that it changes, which is a folder of this machine, %s. "
                    "Push that one too, under a name of its own, and write it into adapter_config.json as "
                    "base_model_name_or_path; or push a whole model: srpo push ... --merged",
                    base,
                )


def beside_card(folder: Path) -> dict[str, Any]:
    """What a card says of the files beside it: `router`, `picture` and `hashes` of `srpo.hub.card.model_card`."""
    router = read_yaml(folder / ROUTER) if (folder / ROUTER).is_file() else None
    try:
        names = [name for name in files_to_push(folder) if name != CARD]
    except ValueError:  # nothing is saved yet
        names = []
    made_from = router.get("made_from") if isinstance(router, dict) else None
    hashes = {name: sha256_of(folder / name) for name in names}
    hashes |= {f"made from: {name}": str(value) for name, value in (made_from or {}).items() if value is not None}
    return {"router": router, "picture": PICTURE if PICTURE in names else None, "hashes": hashes}


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
