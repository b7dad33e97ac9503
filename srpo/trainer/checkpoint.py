"""What a checkpoint of the trainer core holds beyond TRL's, so that 4 + 4 steps are the 8 steps of one run, bitwise.

the teacher                    teacher.safetensors, by `srpo.teacher.teacher`
the reference policy           reference.safetensors, by `srpo.trainer.reference`
the rest of a generation batch rollouts_<rank>.safetensors, where a checkpoint falls inside one: no pickle
the environment                environment_<rank>.json: its ledger and budgets, and the streak of lost batches
what belongs to the weights    whatever the trainer's `save_beside` writes, also beside the last weights and on the Hub
the clock                      nothing: the number of the step says where the run is (`srpo.trainer.clock`)
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from srpo.run.steps import check_start
from srpo.run.watch import part
from srpo.run.whole import AUTO, SAVING, put_in_place, resume_from, rotate, seal, whole_looking
from srpo.trainer.distiller import Distiller
from srpo.trainer.nested import load_nested, save_nested
from srpo.trainer.reference import Reference
from srpo.trainer.rollouts import Rollouts

_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")
"""What torch says, as a plain RuntimeError, of a disk that does not take a file."""


class SaveFailed(OSError):
    """A checkpoint could not be written; names it, the reason, and the last whole one."""


class StartIsCandidate(TrainerCallback):
    """With `load_best_model_at_end` the weights that training starts from are evaluated and saved as step 0, so that a
    training that only made them worse ends with them.

    Args:
        trainer: who saves; its configuration has set `eval_on_start`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        trainer = self.trainer
        if args.load_best_model_at_end and state.global_step == 0 and trainer.is_in_train:
            if trainer._determine_best_metric(metrics, None):  # transformers takes a best step of 0 for none
                state.best_model_checkpoint = str(Path(trainer._get_output_dir(None), f"{PREFIX_CHECKPOINT_DIR}-0"))
            trainer._save_checkpoint(trainer.model, None)


class Checkpoints:
    """Saves and loads the parts of a trainer that have state; every rank calls both methods."""

    def __init__(
        self, accelerator: Accelerator, reference: Reference, distiller: Distiller | None, rollouts: Rollouts | None
    ) -> None:
        self.accelerator = accelerator
        self.reference, self.distiller, self.rollouts = reference, distiller, rollouts
        self.last: int | None = None
        """Step of the newest checkpoint that this process has written."""

    def write(self, trainer: Any, output: Path, theirs: Callable[[], object], batches: Any) -> None:
        """The checkpoint of a step: written beside by all processes, then put in place, pushed, and old ones go.

        Args:
            output: folder of the checkpoints.
            theirs: writes TRL's part, into a folder below `srpo.run.whole.SAVING`.
            batches: as in `save`.

        Raises:
            SaveFailed: nothing is left of the attempt, and earlier checkpoints are as they were.
        """
        args, state = trainer.args, trainer.state
        folder = output / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        draft = output / SAVING / folder.name
        try:
            if args.should_save:
                shutil.rmtree(draft.parent, ignore_errors=True)  # what a killed process left
                draft.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            theirs()
            if Path(state.best_model_checkpoint or "") == draft:
                state.best_model_checkpoint = str(folder)
                if args.should_save:
                    state.save_to_json(str(draft / TRAINER_STATE_NAME))
            self.save(str(draft), batches, args.save_only_model)
            self.accelerator.wait_for_everyone()
            if args.should_save:
                seal(draft)
                put_in_place(draft, folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITER):
                raise
            if args.should_save:
                shutil.rmtree(draft.parent, ignore_errors=True)
            free, last = shutil.disk_usage(output).free, [*whole_looking(output).values()][-1:]
            then = f"resume_from_checkpoint: auto goes on from {last[0]}" if last else "there is no earlier one"
            raise SaveFailed(
                f"{folder} could not be written ({free:,} bytes are free there): {error}; {then}"
            ) from error
        self.last = state.global_step
        self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            with part("push", patient=True):
                trainer._push_from_checkpoint(str(folder))
        if args.should_save:
            rotate(output, args.save_total_limit, state.best_model_checkpoint)

    def save(self, folder: str, batches: Any, model_only: bool) -> None:
        """Add to a checkpoint that TRL has written.

        Args:
            batches: the rest of a generation batch, still to be trained on; None between two.
            model_only: what only resuming needs is left out.
        """
        if not model_only:
            self.reference.save(folder)
        if self.distiller is not None:
            self.distiller.teacher.save(folder)
        if model_only:
            return
        if self.rollouts is not None:
            self._own(folder, "environment", "json").write_text(json.dumps(self.rollouts.state()), encoding="utf-8")
        if batches is not None:
            head = None if self.distiller is None else self.distiller.head_parts()
            save_nested({"batches": batches, "head": head}, self._own(folder, "rollouts", "safetensors"))

    def load(self, folder: str) -> Any:
        """Restore what `save` wrote; the rest of a generation batch, or None.

        Raises:
            FileNotFoundError: the checkpoint was written by a run with other parts.
        """
        self.reference.load(folder)
        if self.distiller is not None:
            self.distiller.teacher.load(folder)
        if self.rollouts is not None:
            path = self._own(folder, "environment", "json")
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: the checkpoint was not written by a run with an environment; resume with the "
                    "recipe that wrote it, or start a new run from its weights"
                )
            self.rollouts.load_state(json.loads(path.read_text(encoding="utf-8")))
        path = self._own(folder, "rollouts", "safetensors")
        if not path.exists():
            return None
        rest = load_nested(path, self.accelerator.device)
        if self.distiller is not None:
            self.distiller.restore_head(rest["head"])
        return rest["batches"]

    def load_experts(self, model: Any, folder: str) -> None:
        """What TRL leaves out of a checkpoint's weights (`load_renamed_weights`)."""
        # Sharded weights have their own format, under the model's own names.
        if self.accelerator.distributed_type not in ("DEEPSPEED", "FSDP") and not is_peft_model(model):
            load_renamed_weights(model, folder)

    def to_resume(self, given: str | bool | None, args: Any, rows: Any) -> str | None:
        """The checkpoint that a run begins with, or None; arguments as of transformers' `train`.

        Args:
            rows: to train on.

        Raises:
            ValueError: it is another run's, or nothing can be trained (`srpo.run.steps.check_start`).
        """
        found = resume_from(given, args.output_dir) if given in AUTO else given
        check_start(rows, args, found)
        found = resume_from(found, args.output_dir)
        if found is not None:
            self.refuse_other_run(found)
        return found

    def refuse_other_run(self, folder: str) -> None:
        """ValueError for a checkpoint of another number of processes, or of another engine.

        transformers writes one random state per process, and would silently skip the missing ones, as it would an
        optimiser's state that is another engine's.
        """
        processes, path = self.accelerator.num_processes, Path(folder)
        wrote = len(list(path.glob("rng_state_*.pth"))) or 1
        if wrote != processes and any(path.glob("rng_state*.pth")):
            raise ValueError(
                f"{folder} was written by {wrote} processes and this run has {processes}: rollouts and random states "
                f"belong to a process, so resume with {wrote}, or start a new run from its weights"
            )
        engine, found = engine_of(self.accelerator), engine_that_wrote(path)
        if found not in (None, engine):
            raise ValueError(
                f"{folder} was written with {found} and this run has {engine}: an optimiser's state belongs to its "
                f"engine, so resume with {found}, or start a new run from its weights"
            )

    def _own(self, folder: str, name: str, ending: str) -> Path:
        return Path(folder) / f"{name}_{self.accelerator.process_index}.{ending}"


def engine_of(accelerator: Accelerator) -> str:
    """Whose files the optimiser's states of a run are, in words."""
    if accelerator.distributed_type == "DEEPSPEED":
        return "ZeRO-3" if accelerator.state.deepspeed_plugin.zero_stage == 3 else "ZeRO-1 or 2"
    return "FSDP" if accelerator.distributed_type == "FSDP" else "no engine"


def engine_that_wrote(folder: Path) -> str | None:
    """The same of a checkpoint; None: it has no optimiser's state."""
    if any(folder.glob("global_step*")):
        return "ZeRO-3" if any(folder.glob("global_step*/zero_pp_rank_*_model_states.pt")) else "ZeRO-1 or 2"
    if any(folder.glob("optimizer_*")) or (folder / "optimizer.bin").exists():
        return "FSDP"
    return "no engine" if (folder / "optimizer.pt").exists() else None


def load_renamed_weights(model: PreTrainedModel, folder: str) -> None:
    """Load all of `folder` into `model` if it holds names that are not the model's; else it was loaded already.

    transformers 5 trains all experts of a layer as one tensor and saves them one by one, under the names of the Hub.
    Its Trainer loads a checkpoint with `load_state_dict(strict=False)`, which knows nothing of that: the experts stay
    as they are, with a warning only (seen with 5.23 on Qwen3-MoE). `from_pretrained` does know.

    Does nothing for folders without whole safetensors weights (adapters, FSDP, DeepSpeed).
    """
    if saved_names(Path(folder)) - model.state_dict().keys():
        fresh = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(fresh.state_dict())


def saved_names(folder: Path) -> set[str]:
    """Names of the tensors in a folder's `model.safetensors`, in one piece or several; empty if it has none."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        return set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())
