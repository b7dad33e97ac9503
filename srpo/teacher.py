"""The self-teacher: whose weights it has, how they move, and how it re-scores the student's completions.

    ema           theta' <- (1 - tau) theta' + tau theta, in fp32, once per generation batch   [SDPO A.2; tau = 0.05]
    trust_region  logits_q = (1 - tau) logits_first + tau logits_theta                          [SDPO A.2, Eq. 10]
    frozen        the weights training started from
    live          the student's weights when the batch was scored (diverges, SDPO Table 4)

The teacher never generates: it sees its own prompt followed by the exact ids that the student sampled. It runs on the
distilled rows only. LoRA policies keep it as a second adapter that starts as a copy of the student's A and B (TRL's
starts from zero and lags for dozens of steps); other policies keep a second model.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import create_model_from_path, use_adapter

from srpo.heads import completion_hidden, head_of
from srpo.objectives.divergence import Head

ADAPTER = "teacher"
WEIGHTS = "teacher.safetensors"


class Teacher:
    """Weights of the self-teacher beside a student.

    Args:
        kind: "ema", "trust_region", "frozen" or "live".
        student: the trainer's model, already patched by TRL; a PEFT model or a plain one.
        twin: an unpatched copy of the student taken before TRL patched it (a patched forward would run the student's
            weights), or None where none is needed (LoRA policies, live).
        rate: tau.
        snapshot_head: keep the student's LM head as it was at scoring time; needed where several optimiser steps use
            one scored batch and the teacher reads the student's head.
    """

    def __init__(
        self,
        kind: str,
        student: torch.nn.Module,
        twin: PreTrainedModel | None,
        rate: float,
        accelerator: Accelerator,
        snapshot_head: bool = False,
    ):
        self.kind = kind
        self.rate = rate
        self.accelerator = accelerator
        self.student = student
        self.model = None
        self.is_adapter = is_peft_model(student) and kind != "live"
        # Whether `head` returns weights that cannot be had again once the student has moved.
        self.snapshots_head = not self.is_adapter and (kind == "trust_region" or (kind == "live" and snapshot_head))
        self.sharded = accelerator.distributed_type in ("DEEPSPEED", "FSDP")
        if self.is_adapter:
            _add_teacher_adapter(student)
        elif kind != "live":
            if twin is None:
                raise ValueError(f"teacher_model_kind={kind!r} needs a copy of the policy taken before it was patched")
            self.model = _prepare(twin, accelerator)
        if kind == "trust_region" and head_of(_base(student)).softcap is not None:
            raise ValueError("trust_region mixes logits linearly; a model with soft-capped logits does not allow it")

    def score(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """Teacher hidden states that predict the last `length` tokens: [n, length, D'] (see `head` for D')."""
        if self.kind == "live":
            return self._student_hidden(ids, mask, length)
        if self.is_adapter:
            with self._teacher_adapter():
                first = self._student_hidden(ids, mask, length)
        else:
            first = completion_hidden(self.model, _base(self.accelerator.unwrap_model(self.model)), ids, mask, length)
        if self.kind != "trust_region":
            return first
        live = self._student_hidden(ids, mask, length)
        if self.is_adapter:  # one shared head: mixing hidden states mixes logits
            return torch.lerp(first.float(), live.float(), self.rate)
        return torch.cat([(1 - self.rate) * first, self.rate * live.to(first.dtype)], dim=-1)

    @property
    def width(self) -> int:
        """D' of `score`."""
        hidden = _base(self.accelerator.unwrap_model(self.student)).config.get_text_config().hidden_size
        return 2 * hidden if self.kind == "trust_region" and not self.is_adapter else hidden

    def head(self) -> Head:
        """The projection of `score`'s hidden states. Call it after `score`, once per scored batch.

        trust_region with two models has D' = 2D: [W_first | W_student] on [(1 - tau) h_first ; tau h_student].
        """
        student = head_of(_base(self.accelerator.unwrap_model(self.student)))
        if self.kind == "live" or self.is_adapter:
            return _snapshot(student) if self.snapshots_head else student
        own = head_of(_base(self.accelerator.unwrap_model(self.model)))
        if self.kind != "trust_region":
            return own
        with own.gather(), student.gather():
            weight = torch.cat([own.weight, student.weight.to(own.weight.dtype)], dim=1).detach()
            bias = None
            if own.bias is not None:
                bias = torch.lerp(own.bias, student.bias.to(own.bias.dtype), self.rate).detach()
        return Head(weight, bias, None, own.scale)

    @torch.no_grad()
    def update(self) -> None:
        """Move an EMA teacher towards the student; the other kinds do not move. Call once per generation batch."""
        if self.kind != "ema":
            return
        source = self.accelerator.unwrap_model(self.student)
        if self.is_adapter:
            source, target = _adapter_parameters(source)
        else:
            target = self.accelerator.unwrap_model(self.model)
        # TRL's in-place average also gathers what ZeRO-3 has partitioned.
        SyncRefModelCallback.sync_target_model(source, target, self.rate)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """A model saved inside holds no teacher adapter: that is not part of the policy, and has its own file."""
        configs: dict[str, Any] = self.student.peft_config if self.is_adapter else {}
        own = configs.pop(ADAPTER, None)
        try:
            yield
        finally:
            if own is not None:
                configs[ADAPTER] = own

    def save(self, folder: str) -> None:
        """Write the teacher's own weights into a checkpoint folder; every rank calls this, the main one writes."""
        if self.kind == "live":
            return
        if self.is_adapter:
            state = get_peft_model_state_dict(self.accelerator.unwrap_model(self.student), adapter_name=ADAPTER)
        else:
            state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            # Tied weights share memory, which safetensors refuses: every tensor is written on its own.
            save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, _path(folder))

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises FileNotFoundError for a checkpoint that holds no teacher."""
        if self.kind == "live":
            return
        path = _path(folder)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was not written by this objective and teacher kind ({self.kind}); "
                "resume with the recipe that wrote it, or start a new run from its weights"
            )
        if self.is_adapter:
            student = self.accelerator.unwrap_model(self.student)
            set_peft_model_state_dict(student, load_file(path), adapter_name=ADAPTER)
        elif self.sharded and self.accelerator.distributed_type == "FSDP":
            raise NotImplementedError("resuming a full-weight teacher under FSDP is not supported; use LoRA or ZeRO-2")
        else:
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(path))

    def _student_hidden(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        return completion_hidden(self.student, _base(self.accelerator.unwrap_model(self.student)), ids, mask, length)

    def _teacher_adapter(self) -> AbstractContextManager[None]:
        return use_adapter(self.accelerator.unwrap_model(self.student), ADAPTER) if self.is_adapter else nullcontext()


def unpatched_copy(model: str | PreTrainedModel, kind: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """A frozen copy of a policy, to be taken before TRL patches it; fp32 where the teacher moves (EMA).

    A path or Hub id is loaded once more, with `init_kwargs`. In bf16 an EMA at tau = 0.05 loses most of each update to
    rounding (measured: 80 %).
    """
    twin = create_model_from_path(model, **init_kwargs) if isinstance(model, str) else copy.deepcopy(model)
    # A model that went through another TRL trainer (a warm start) carries a patched forward, bound to that very model.
    vars(twin).pop("forward", None)
    return twin.float() if kind == "ema" else twin


def _prepare(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    model.requires_grad_(False)
    model.eval()
    if accelerator.distributed_type == "DEEPSPEED":
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == "FSDP":
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def _add_teacher_adapter(student: torch.nn.Module) -> None:
    name = student.active_adapter
    start = {k: v.detach().clone() for k, v in get_peft_model_state_dict(student, adapter_name=name).items()}
    if ADAPTER not in student.peft_config:
        # Its random start is overwritten below, and must not change which completions are sampled.
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            student.add_adapter(ADAPTER, copy.deepcopy(student.peft_config[name]))
    set_peft_model_state_dict(student, start, adapter_name=ADAPTER)
    student.set_adapter(name)  # also freezes the teacher: only the active adapter trains


def _adapter_parameters(student: torch.nn.Module) -> tuple[torch.nn.ParameterList, torch.nn.ParameterList]:
    """The student's adapter and the teacher's, parameter by parameter."""
    parameters = dict(student.named_parameters())
    own = {name: p for name, p in parameters.items() if ADAPTER in name.split(".")}
    names = (".".join(student.active_adapter if part == ADAPTER else part for part in n.split(".")) for n in own)
    return torch.nn.ParameterList(parameters[name] for name in names), torch.nn.ParameterList(own.values())


def _base(model: torch.nn.Module) -> PreTrainedModel:
    return model.get_base_model() if is_peft_model(model) else model


def _snapshot(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach().clone()
    with head.gather():
        return Head(head.weight.detach().clone(), bias, head.softcap, head.scale)


def _path(folder: str) -> Path:
    return Path(folder) / WEIGHTS
