"""The self-teacher: whose weights it has, how they move, and how it re-scores the student's completions.

    ema           theta' <- (1 - tau) theta' + tau theta, in fp32, once per generation batch   [SDPO A.2; tau = 0.05]
    trust_region  logits_q = (1 - tau) logits_first + tau logits_theta                          [SDPO A.2, Eq. 10]
    frozen        the weights training started from
    live          the student's weights when the batch was scored (diverges, SDPO Table 4)

The teacher never generates: it sees its own prompt followed by the exact ids that the student sampled. It runs on the
distilled rows only. PEFT policies keep it as other values of the weights that train (`srpo.trainer.other_weights`),
which start as the student's (TRL's second adapter starts from zero and lags for dozens of steps); other policies keep
a second model. Neither is ever part of the policy's files: a checkpoint has it in a file of its own.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import create_model_from_path

from srpo.objectives.divergence import Head
from srpo.teacher.lm_head import completion_hidden, head_of
from srpo.trainer.engines import load_whole, save_whole
from srpo.trainer.other_weights import OtherWeights

WEIGHTS = "teacher.safetensors"


class Teacher:
    """Weights of the self-teacher beside a student. Student and twin have scoring heads (`srpo.teacher.lm_head`).

    Args:
        kind: "ema", "trust_region", "frozen" or "live".
        student: the trainer's model, already patched by TRL; a PEFT model or a plain one.
        twin: an unpatched copy of the student taken before TRL patched it (a patched forward would run the student's
            weights), or None where none is needed (PEFT policies, live).
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
        self.model: Any = None
        self.weights: OtherWeights | None = None
        self.sharded = accelerator.distributed_type in ("DEEPSPEED", "FSDP")
        if is_peft_model(student) and kind != "live":
            if accelerator.distributed_type == "FSDP" and accelerator.state.fsdp_plugin.fsdp_version == 1:
                raise ValueError("a PEFT policy with a teacher needs FSDP2: set fsdp_version: 2 (fsdp2.yaml)")
            self.weights = OtherWeights(student)
        elif kind != "live":
            if twin is None:
                raise ValueError(f"teacher_model_kind={kind!r} needs a copy of the policy taken before it was patched")
            self.model = _prepare(twin, accelerator, moves=kind == "ema")
        # Two models, or one whose head is among the weights that train: the teacher then has a head of its own.
        self.owns_head = self.model is not None or (self.weights is not None and _head_trains(student))
        # Whether `head` returns weights that cannot be had again once the student has moved.
        self.snapshots_head = self.owns_head if kind == "trust_region" else kind == "live" and snapshot_head
        self._begun = False
        if kind == "trust_region" and head_of(_base(student)).softcap is not None:
            raise ValueError("trust_region mixes logits linearly; a model with soft-capped logits does not allow it")

    def begin(self) -> None:
        """Call when training begins: engines may only now have given all ranks the same weights to start from."""
        if self.weights is not None and not self._begun:
            self.weights = OtherWeights(self.accelerator.unwrap_model(self.student))
        self._begun = True

    def score(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """Teacher hidden states that predict the last `length` tokens: [n, length, D'] (see `head` for D')."""
        if self.kind == "live":
            return self._student_hidden(ids, mask, length)
        if self.weights is not None:
            with self.weights.put_into(self.accelerator.unwrap_model(self.student)):
                first = self._student_hidden(ids, mask, length)
        else:
            with self._autocast(ids.device):
                first = completion_hidden(self.model, ids, mask, length)
        if self.kind != "trust_region":
            return first
        live = self._student_hidden(ids, mask, length)
        if not self.owns_head:  # one shared head: mixing hidden states mixes logits
            return torch.lerp(first.float(), live.float(), self.rate)
        return torch.cat([(1 - self.rate) * first, self.rate * live.to(first.dtype)], dim=-1)

    @property
    def width(self) -> int:
        """D' of `score`."""
        hidden = _base(self.accelerator.unwrap_model(self.student)).config.get_text_config().hidden_size
        return 2 * hidden if self.kind == "trust_region" and self.owns_head else hidden

    def head(self) -> Head:
        """The projection of `score`'s hidden states. Call it after `score`, once per scored batch.

        trust_region with two heads has D' = 2D: [W_first | W_student] on [(1 - tau) h_first ; tau h_student].
        """
        policy = self.accelerator.unwrap_model(self.student)
        if not self.owns_head:
            student = head_of(_base(policy))
            return _snapshot(student) if self.snapshots_head else student
        if self.weights is not None:
            with self.weights.put_into(policy):
                own = _snapshot(head_of(_base(policy)))
        else:
            own = head_of(_base(self.accelerator.unwrap_model(self.model)))
        if self.kind != "trust_region":
            return own
        student = head_of(_base(policy))
        with own.gather(), student.gather():
            weight = torch.cat([own.weight, student.weight.to(own.weight.dtype)], dim=1).detach()
            bias = None
            if own.bias is not None and student.bias is not None:
                bias = torch.lerp(own.bias, student.bias.to(own.bias.dtype), self.rate).detach()
        return Head(weight, bias, None, own.scale)

    @torch.no_grad()
    def update(self) -> None:
        """Move an EMA teacher towards the student; the other kinds do not move. Call once per generation batch."""
        if self.kind != "ema":
            return
        source = self.accelerator.unwrap_model(self.student)
        if self.weights is not None:
            self.weights.move(source, self.rate)
            return
        # TRL's in-place average also gathers what ZeRO-3 has partitioned.
        SyncRefModelCallback.sync_target_model(source, self.accelerator.unwrap_model(self.model), self.rate)

    def save(self, folder: str) -> None:
        """Write the teacher's own weights into a checkpoint folder; every rank calls this, the main one writes."""
        if self.kind == "live":
            return
        state = self.accelerator.get_state_dict(self.model) if self.weights is None else self.weights.values
        save_whole(state, Path(folder) / WEIGHTS, self.accelerator)

    def load(self, folder: str) -> None:
        """Restore what `save` wrote. Raises FileNotFoundError for a checkpoint that holds no teacher."""
        if self.kind == "live":
            return
        path = Path(folder) / WEIGHTS
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was not written by this objective and teacher kind ({self.kind}); "
                "resume with the recipe that wrote it, or start a new run from its weights"
            )
        if self.weights is not None:
            self.weights.load(load_file(path), path)
            self._begun = True
        elif self.sharded:
            load_whole(self.accelerator.unwrap_model(self.model), load_file(path))
        else:
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(path))

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        # Under DeepSpeed accelerate leaves the precision to the engine, which this model has none of.
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if self.accelerator.distributed_type != "DEEPSPEED" or precision is None:
            return nullcontext()
        return torch.autocast(device.type, precision)

    def _student_hidden(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        return completion_hidden(self.student, ids, mask, length)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy that computes with its own weights, whatever trainers the model went through before.

    TRL's trainers (a warm start's too) leave patched forwards on a model and on its head. A copy would still run
    those, and with them the original's weights. accelerate's patches (`_hf_hook`) are copied as they should be.
    With ZeRO-3, all ranks make this call.
    """
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if sharded:  # ZeRO-3: a copy of an empty part has no weights
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded):
            twin = copy.deepcopy(model)
    else:
        twin = copy.deepcopy(model)
    for module in twin.modules():
        if not hasattr(module, "_hf_hook"):
            vars(module).pop("forward", None)
    return twin


def unpatched_copy(model: str | PreTrainedModel, init_kwargs: dict[str, Any], in_fp32: bool) -> PreTrainedModel:
    """A frozen copy of a policy, to be taken before TRL patches it; a path or Hub id is loaded once more.

    `in_fp32`: as the student is trained, and where the teacher moves (EMA) in any case: in bf16 an average at tau =
    0.05 loses most of each update to rounding (measured: 80 %).
    """
    twin = create_model_from_path(model, **init_kwargs) if isinstance(model, str) else plain_copy(model)
    return twin.float() if in_fp32 else twin


def _prepare(model: PreTrainedModel, accelerator: Accelerator, moves: bool) -> torch.nn.Module:
    model.requires_grad_(False)
    model.eval()
    if accelerator.distributed_type == "DEEPSPEED":
        zero3 = accelerator.state.deepspeed_plugin.zero_stage == 3
        if zero3 and moves and accelerator.mixed_precision != "no":
            raise ValueError(
                "teacher_model_kind: ema keeps the teacher in fp32, and ZeRO-3 would round it to "
                f"{accelerator.mixed_precision}: use fsdp2.yaml, zero2.yaml or LoRA, or another teacher_model_kind"
            )
        # Where it is not sharded no engine is needed, and DeepSpeed's would round it.
        return prepare_deepspeed(model, accelerator) if zero3 else model.to(accelerator.device)
    if accelerator.distributed_type == "FSDP":
        if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            _from_first_rank(model, accelerator.device)
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def _from_first_rank(model: PreTrainedModel, device: torch.device) -> None:
    """transformers has read the weights on the first rank only; accelerate hands out the student's, nobody ours."""
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=device)
        model.tie_weights()
    else:
        model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.data, 0)


def _base(model: Any) -> PreTrainedModel:
    return model.get_base_model() if is_peft_model(model) else model


def _head_trains(model: torch.nn.Module) -> bool:
    head = head_of(_base(model))
    return head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)


def _snapshot(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach().clone()
    with head.gather():
        return Head(head.weight.detach().clone(), bias, head.softcap, head.scale)
