"""Other values for the weights of a policy that train: a second policy that shares whatever is frozen.

A PEFT policy trains few of its weights: adapters, biases, the embeddings of single tokens, modules that are kept
whole. A teacher or a reference of it is other values for just those, put into the policy for the time of a pass. So
the model itself never holds anything but the policy, whatever the kind of adapter and whoever saves it. (A second
adapter inside the model would be written with the first one, and PEFT has none for `bias: all` and for
`trainable_token_indices`.)
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class OtherWeights:
    """Values by parameter name, whole on every rank and at least fp32; they start as the model's own.

    Under ZeRO-3 and FSDP2 all ranks make the same calls.
    """

    def __init__(self, model: nn.Module):
        with torch.no_grad(), _gathered(_trained(model)):
            self.values = {name: _at_least_fp32(_whole(p)) for name, p in _trained(model).items()}

    @torch.no_grad()
    def move(self, model: nn.Module, rate: float) -> None:
        """values <- (1 - rate) values + rate model, in the precision of the values."""
        parameters = self._parameters(model)
        with _gathered(parameters):
            for name, value in self.values.items():
                value.lerp_(_whole(parameters[name]).to(value), rate)

    @contextmanager
    def put_into(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has these values, rounded to its own precision; then its own again, bit for bit.

        No graph of the model's may be waiting for its backward pass.
        """
        parameters = self._parameters(model)
        with torch.no_grad(), _gathered(parameters, change=True):
            own = {name: _local(p).clone() for name, p in parameters.items()}
            for name, p in parameters.items():
                _local(p).copy_(_local_part(self.values[name], p))
        _forget_gathered(model)
        try:
            yield
        finally:
            with torch.no_grad(), _gathered(parameters, change=True):
                for name, p in parameters.items():
                    _local(p).copy_(own[name])
            _forget_gathered(model)

    def load(self, values: Mapping[str, Tensor], source: object) -> None:
        """Take values that another `OtherWeights` of the same policy had.

        Raises:
            ValueError: they are of other weights; `source` is named.
        """
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        wanted = {name: tuple(value.shape) for name, value in self.values.items()}
        if shapes != wanted:
            odd = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise ValueError(
                f"{source} holds other weights than those that train here ({len(odd)} differ, the first is {odd[0]}): "
                "resume with the model and the adapter settings of the run that wrote it"
            )
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(values[name])

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        # Looked up again each time: FSDP2 replaces parameters when it shards them.
        found = dict(model.named_parameters())
        return {name: found[name] for name in self.values}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _at_least_fp32(value: Tensor) -> Tensor:
    # A moving average with a small rate would lose most of each update to bf16's rounding.
    value = value.detach()
    return value.float().clone() if value.is_floating_point() and value.itemsize < 4 else value.clone()


def _gathered(parameters: Mapping[str, nn.Parameter], change: bool = False) -> AbstractContextManager[Any]:
    """Inside, what ZeRO-3 has partitioned is whole; with `change`, the first rank's values are kept for all."""
    if not any(hasattr(p, "ds_id") for p in parameters.values()):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=0 if change else None)


def _whole(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p.data


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p.data


def _local_part(value: Tensor, p: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return value
    # Every rank has the whole value: nothing is sent.
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()


def _forget_gathered(model: nn.Module) -> None:
    """FSDP2 may keep weights gathered after a forward without gradient; those are the other ones' by then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
