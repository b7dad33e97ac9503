"""Publishing on the Hugging Face Hub, under one rule: whatever goes wrong there is told in words and training goes on.

TRL's trainers contact the Hub when they are constructed, at every save and at the end, and an error there ends the
run. [`HubMixin`], placed before the trainer's class, keeps the arguments and strategies (`push_to_hub`,
`hub_model_id`, `hub_strategy`, ...) and replaces those calls. Saving itself stays outside the rule: a full disk is not
the Hub's fault.
"""

import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from srpo.hub.card import model_card
from srpo.hub.errors import explain
from srpo.hub.files import files_to_push
from srpo.run.whole import MANIFEST, read_manifest, seal
from srpo.strict_yaml import read_yaml

logger = logging.getLogger(__name__)

_STAGING = "_hub"  # upload_folder leaves out names that begin with "_"


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    path_in_repo: str | None = None,
    commit_message: str = "Upload model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    resumable: bool = False,
    beside: Sequence[str] = (),
) -> str:
    """Creates the repository where it is missing and uploads the policy in a folder; returns the URL of the commit.

    Args:
        folder: a saved model, or a checkpoint of a run.
        repo_id: `name` or `owner/name`.
        path_in_repo: folder in the repository; None: its root.
        commit_message: as the Hub shows it.
        token: None: the logged-in user's, or HF_TOKEN.
        private: only for a repository that is created.
        revision: branch to commit to; None: main.
        resumable: also upload optimiser, scheduler, random state, teacher and whatever else resuming needs.
        beside: names of further files that belong to the policy (see `srpo.hub.files`).

    Raises:
        ValueError: the folder holds no policy.
        Any error of `huggingface_hub`. Inside a run, wrap it in [`safe_push`].
    """
    from transformers.utils.hub import hf_api

    names = files_to_push(folder, resumable, beside)
    url = hf_api().create_repo(repo_id, token=token, private=private, exist_ok=True)
    return str(
        hf_api().upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=commit_message,
            token=token,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
        )
    )


def safe_push(push: Callable[[], object], *, what: str = "the push to the Hub", retry: str = "") -> bool:
    """Runs `push`; an error is logged with its cause and how to try again, and never raised.

    Only `Exception`s are caught: Ctrl-C and a scheduler's exit still end the run.

    Returns:
        Whether it succeeded.
    """
    try:
        push()
    except Exception as error:
        _report(error, what, retry)
        return False
    return True


def _report(error: BaseException, what: str, retry: str) -> None:
    logger.warning("%s failed: %s. Training goes on.%s", what, explain(error), f" {retry}" if retry else "")


class HubMixin:
    """Makes a `transformers.Trainer` subclass survive the Hub. Put it first: `class T(HubMixin, GRPOTrainer)`.

    `save_beside` is that of `srpo.trainer.trainer`. Reads, where the trainer has them: `objective` (str), `recipe`
    (dict or None), `heldout_table` (markdown or None).
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

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository; on failure `hub_model_id` stays None and the next push tries again."""
        self.push_in_progress = None
        self._say_if_the_base_stays_here()
        safe_push(
            lambda: super(HubMixin, self).init_hf_repo(token=token, private=private),  # type: ignore[misc]
            what="creating the repository on the Hub",
            retry="The next push tries again.",
        )

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
            repo_id=self.hub_model_id,
            router=_router_of(output_dir),
            recipe=getattr(self, "recipe", None),
            heldout_table=getattr(self, "heldout_table", None),
            dataset_name=dataset_name,
            tags=own_tags,
        )
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "README.md").write_text(card, encoding="utf-8")

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
            Whether it is on the Hub; always True with `blocking=False`, where a failure is logged later, and on every
            process but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)  # type: ignore[attr-defined]  # all ranks take part
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return True
        self.create_model_card(**{"model_name": (self.args.hub_model_id or "").split("/")[-1] or None} | card)
        folder = str(self.args.output_dir)
        if not self._have_repo(token, private):
            self._say_how_to_retry(folder)
            return False
        self._finish_current_push()  # type: ignore[attr-defined]
        return self._upload(
            folder, commit_message or "Upload model", wait=blocking, token=token, revision=revision, retry_from=folder
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not (Path(checkpoint_folder) / MANIFEST).is_file():
            return  # transformers calls this before all of it is written; the trainer does when it is whole
        strategy = str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy))
        if not self.is_world_process_zero() or strategy == "end":  # type: ignore[attr-defined]
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        if not self._have_repo(None, None):
            self._say_how_to_retry(checkpoint_folder)
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        staged = self._stage(checkpoint_folder)
        self._upload(staged, message, retry_from=checkpoint_folder, cleanup=strategy == "every_save")
        if strategy in ("checkpoint", "all_checkpoints"):
            name = "last-checkpoint" if strategy == "checkpoint" else Path(checkpoint_folder).name
            self._upload(
                staged, message + ", checkpoint", retry_from=checkpoint_folder, path_in_repo=name, cleanup=True
            )

    def _have_repo(self, token: str | None, private: bool | None) -> bool:
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        return self.hub_model_id is not None

    def _stage(self, checkpoint_folder: str) -> str:
        """Hard links to the checkpoint's files: the upload survives the deletion of old checkpoints, at no cost."""
        source = Path(checkpoint_folder)
        staged = Path(self.args.output_dir) / _STAGING / source.name
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(source, staged, copy_function=_link_or_copy)
        card = Path(self.args.output_dir) / "README.md"
        if card.is_file():
            shutil.copy(card, staged / "README.md")
        # What goes up is whole by itself: it lacks what stays here, and has the run's card.
        known = read_manifest(source)
        (staged / MANIFEST).unlink()
        names = files_to_push(staged, resumable=True)
        for path in [path for path in staged.rglob("*") if path.is_file()]:
            if path.relative_to(staged).as_posix() not in names:
                path.unlink()
        seal(staged, {name: entry for name, entry in known.items() if name != "README.md"})
        return str(staged)

    def _upload(
        self,
        folder: str,
        message: str,
        *,
        retry_from: str,
        wait: bool = False,
        token: str | None = None,
        revision: str | None = None,
        path_in_repo: str | None = None,
        cleanup: bool = False,
    ) -> bool:
        """Uploads in a background thread, and waits for it if asked to."""
        from transformers.utils.hub import PushInProgress, hf_api

        jobs: list[Future[Any]] = []

        def start() -> None:
            jobs.append(
                hf_api().run_as_future(
                    push_checkpoint,
                    folder,
                    self.hub_model_id,
                    path_in_repo=path_in_repo,
                    commit_message=message,
                    token=token or self.args.hub_token,
                    private=self.args.hub_private_repo,
                    revision=revision or self.args.hub_revision,
                    resumable=path_in_repo is not None,
                    beside=self._names_beside(),
                )
            )

        if not safe_push(start, retry=_retry_command(self.hub_model_id, retry_from)):
            return False

        def finished(job: "Future[Any]") -> None:
            error = job.exception()
            if error is not None:
                _report(error, f"the push of {retry_from}", _retry_command(self.hub_model_id, retry_from))
            if cleanup:
                shutil.rmtree(folder, ignore_errors=True)

        jobs[0].add_done_callback(finished)
        if wait:
            return jobs[0].exception() is None
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress(jobs)
        else:
            self.push_in_progress.jobs.extend(jobs)
        return True

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
                    "base_model_name_or_path",
                    base,
                )

    def _say_how_to_retry(self, folder: str) -> None:
        repo = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        logger.warning("%s was not pushed. %s", folder, _retry_command(repo, folder))


def _router_of(folder: Path) -> Any:
    """What `router.yaml` says, which `save_beside` wrote with the weights; None: there is none."""
    path = folder / "router.yaml"
    return read_yaml(path) if path.is_file() else None


def _retry_command(repo_id: str | None, folder: str) -> str:
    return f'By hand: python -c "from srpo.hub.hub import push_checkpoint; push_checkpoint({folder!r}, {repo_id!r})"'


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
