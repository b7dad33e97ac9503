"""A step with a NaN or an infinity is not made, on any process; its batch is kept for reading; a few end the run.

    reward, advantage, log-prob, loss    the micro-batch's loss becomes NaN, and so does the step's gradient
    gradient                             its norm is not finite: the optimiser gets none, and stays as it is, bitwise
    parameter                            looked at before weights are saved: they never are

DeepSpeed makes its step within the backward pass: there the engine itself leaves out one whose gradient norm is not
finite. With fp16 an infinite gradient alone is the loss scaler's affair, which leaves out the step too.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from srpo.losses import note
from srpo.types import Stopped

logger = logging.get_logger(__name__)

BAD_REWARDS = "bad_rewards"
"""Of a batch: [B] bool, rows whose reward was NaN or infinite."""
_PER_TOKEN = (
    *("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio"),
    *("teacher_logps", "distillation_weights"),
)
FOLDER = "bad_steps"


class BadNumbers(Stopped):
    """Too many steps in a row could not be made, or the weights are no numbers any more."""


class BadSteps(TrainerCallback):
    """Finds them, and leaves out the step.

    Args:
        most: steps in a row that may be left out.

    Attributes:
        skipped: whether the last step was left out.
        last: why, of the last one that was.
    """

    def __init__(self, most: int, accelerator: Accelerator, tokenizer: Any) -> None:
        self.most, self.accelerator, self.tokenizer = most, accelerator, tokenizer
        self.skipped, self.verdict, self.last = False, "", ""
        self._said: list[str] = []
        self._batches: list[tuple[dict[str, Any], dict[str, Tensor], Tensor]] = []  # inputs, bad rows, loss
        self._norm: Any = None
        self._streak = self._unlogged = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped, self.verdict, self._streak, self._unlogged = False, "", 0, 0
        self._batches.clear()

    # ------------------------------------------------------------------------------------------------ what is seen

    def reward(self, words: str) -> None:
        """A reward function has returned a number that is none; see `srpo.trainer.rewards.checked_reward`."""
        self._said.append(words)
        logger.warning("%s; the row counts as lost, and in training its step is not made", words)

    def rewards(self, values: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """[all B, functions] of all processes with the infinite ones as lost, and which rows of this one had such;
        None: no process had any."""
        bad = torch.isinf(values)
        return values.masked_fill(bad, math.nan), bad.any(dim=1)[rows] if bad.any() else None

    def loss(self, inputs: dict[str, Any], loss: Tensor) -> Tensor:
        """The loss of a micro-batch; NaN, with a gradient of NaNs, where anything of it is not finite."""
        bad = _bad_rows(inputs)
        self._batches.append((inputs, bad, loss.detach()))
        rows = torch.stack([row.any() for row in bad.values()]).any() if bad else torch.zeros((), dtype=torch.bool)
        number: Tensor = loss.detach() * 0 + torch.where(rows.to(loss.device), math.nan, 1.0)  # 1, or NaN
        return loss * number

    def norm(self, value: Any) -> None:
        """The gradient's, before it is clipped, on all processes together."""
        self._norm = value

    def since_logged(self) -> dict[str, float]:
        """What to log of the steps that were left out since the last call: how many, and that they have no loss."""
        count, self._unlogged = self._unlogged, 0
        return {"bad_steps": float(count), "loss": math.nan} if count else {}

    # ------------------------------------------------------------------------------------------------ the step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = self._norm.full_tensor() if hasattr(self._norm, "full_tensor") else self._norm
        batches, self._batches = self._batches, []
        self.skipped = norm is not None and not math.isfinite(float(norm))
        if self.skipped:
            own = [cause for i, batch in enumerate(batches) for cause in self._causes(i, *batch)]
            told = gather_object([(own, self._said[:1])])
            found, said = [causes for causes, _ in told], [words for _, some in told for words in some][:1]
            if not any(found) and self.accelerator.scaler is not None:
                self.skipped = False  # the scaler leaves the step out, and scales less
                return
            kwargs["optimizer"].zero_grad(set_to_none=True)  # an optimiser passes over what has no gradient
            self._note(args, state, batches, own, found, said, float(norm))
        else:
            self._streak = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.verdict and not control.should_training_stop:
            control.should_save = control.should_training_stop = True

    def conclude(self, args: Any) -> None:
        """After the training."""
        if self.verdict:
            raise BadNumbers(f"{self.verdict}. Weights and optimiser are as before them, saved in {args.output_dir}")

    def _causes(self, i: int, inputs: dict[str, Any], bad: dict[str, Tensor], loss: Tensor) -> list[str]:
        where = f"micro-batch {i + 1}"
        found = [f"{name} of {int(rows.sum())} rows of {where}" for name, rows in bad.items() if rows.any()]
        return found if found or math.isfinite(loss) else [f"the loss of {where} is {float(loss)}"]

    def _note(
        self,
        args: Any,
        state: Any,
        batches: list[Any],
        own: list[str],
        found: list[list[str]],
        said: list[str],
        norm: float,
    ) -> None:
        self._streak, self._unlogged = self._streak + 1, self._unlogged + 1
        causes = [f"process {rank}: {cause}" for rank, those in enumerate(found) for cause in those]
        if not causes:
            causes = [f"the gradient's norm is {norm}, of a finite loss"]
        self._said = []
        what = self.last = "; ".join([*causes[:3], *(["..."] if len(causes) > 3 else []), *said])
        step, rank = state.global_step + 1, self.accelerator.process_index
        path = Path(args.output_dir) / FOLDER / f"step_{step:05d}_{rank}.jsonl"
        if own or not any(found):
            try:
                self._dump(path, step, batches)
            except OSError as error:
                logger.warning("%s could not be written, and the run goes on: %s", path, error)
        logger.warning("Step %d is not made, not finite: %s. The batch is in %s", step, what, path.parent)
        if self.accelerator.is_main_process:
            note(args.output_dir, step, "steps", {what: 1})
        if self._streak >= self.most:
            self.verdict = (
                f"{self._streak} steps in a row were not finite, the last, {step}, because of: {what}; their batches "
                f"are in {path.parent}"
            )

    def _dump(self, path: Path, step: int, batches: list[Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for i, (inputs, bad, loss) in enumerate(batches):
                for row in range(len(inputs["completion_ids"])):
                    told: dict[str, Any] = {"step": step, "micro_batch": i + 1, "row": row, "loss": _number(loss)}
                    told["not_finite"] = [name for name, rows in bad.items() if rows[row]]
                    told["advantage"] = _number(inputs["advantages"][row].sum())
                    for name in ("prompt", "completion"):
                        ids = inputs[f"{name}_ids"][row][inputs[f"{name}_mask"][row].bool()]
                        told[name] = self.tokenizer.decode(ids.tolist())
                    file.write(json.dumps(told) + "\n")

    # ------------------------------------------------------------------------------------------------ the weights

    def check_weights(self, model: torch.nn.Module) -> None:
        """Before they are saved. All processes call this.

        Raises:
            BadNumbers: on all of them; names a parameter.
        """
        own = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
        found = [name for names in gather_object([own[:1]]) for name in names]
        if found:
            why = f" ({self.verdict})" if self.verdict else ""
            raise BadNumbers(
                f"the weights are not finite any more, first {found[0]}, and are not saved{why}: lower the learning "
                "rate; resume_from_checkpoint: auto goes on from the last whole checkpoint"
            )


def _bad_rows(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Name -> [B] bool, of what a micro-batch holds for trained tokens."""
    mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    found = {}
    if BAD_REWARDS in inputs:
        found["reward"] = inputs[BAD_REWARDS].bool()
    advantages = inputs["advantages"]
    advantages = advantages.view(len(advantages), -1)
    found["advantage"] = ~torch.isfinite(advantages).all(dim=1) & mask.any(dim=1)
    for name in _PER_TOKEN:
        if (values := inputs.get(name)) is not None:
            odd = ~torch.isfinite(values)
            found[name] = (odd & mask).any(dim=1) if odd.shape == mask.shape else odd.view(len(odd), -1).any(dim=1)
    return found


def _is_finite(parameter: torch.nn.Parameter) -> bool:
    """Of this process's part of it."""
    values = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3's part
    values = values.to_local() if hasattr(values, "to_local") else values  # FSDP2's
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def _number(value: Tensor) -> float | str:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else str(float(value))
