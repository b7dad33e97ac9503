"""Routing replay: run a Mixture-of-Experts model with the experts that an earlier pass chose.

Sampler and trainer, or old and new weights, pick different experts for some tokens, and the importance ratio jumps
where they do. Replaying the recorded choice removes that. Only the *selection* is replayed: scores, softmax, scaling
and everything else stay the model's own live code, so that the router keeps its gradient. R2 replays what the training
engine chose with the old weights (GSPO, arXiv:2507.18071, section 5.3), R3 what the sampler chose (arXiv:2510.11370);
both as in MiniRL (arXiv:2512.01374).

Mechanism
    A pair of hooks on each router, found through the model's own ``_can_record_outputs["router_logits"]``. Between the
    two a `TorchFunctionMode` meets the one ``topk`` that selects experts. Recording copies its indices; replaying
    returns ``(scores.gather(-1, routes), routes)`` in its place. No code per model family. A family that selects in
    another way, a fused kernel that bypasses its router and a router that fires twice are errors, never silence.
State
    Belongs to one model object (`srpo.replay.hooks`): the routes of the *current* micro-batch, looked up by layer and
    not consumed, because gradient checkpointing runs a layer again, perhaps in another thread; hence plain attributes
    and not context variables.
    Stay armed until after ``backward``. If several forwards precede one backward, pass `checkpoint_contexts` to the
    checkpointing function. Copies of the model carry the hooks along, but these react to the original's modules only.
Idle hooks return at once; results are bitwise those of a model without hooks.

Layout of the routes: `srpo.replay.expert_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from srpo.prefix.tree import Layout
from srpo.replay.expert_table import NATIVE, RowRecorder, check_routes
from srpo.replay.hooks import Armed, RouterHooks


class RoutingReplay:
    """Records and replays the experts that a model's routers choose.

    Install it after PEFT has wrapped the model (PEFT copies the modules of ``modules_to_save``); before or after
    `accelerate`, FSDP2 or ZeRO-3 makes no difference.

    Args:
        model: a `transformers` model, bare or wrapped.

    Attributes:
        spec: decoder layer of each router, experts per token, experts in all.

    Raises:
        ValueError: the model has no router, or not one that can be described (k differs between layers, ...).
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks = RouterHooks(model)
        self.spec = self._hooks.spec
        self._measured: Armed | None = None
        self._recorded: Tensor | None = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._hooks.handles:
            handle.remove()

    # Replay

    @property
    def armed(self) -> bool:
        """Whether the next forward replays."""
        return self._hooks.armed is not None

    def arm(self, routes: Tensor, measure: bool = False) -> None:
        """Replay `routes` in every forward and re-forward until `disarm`, which comes after ``backward``.

        Args:
            routes: ``[B, S, L, k]`` integers in the padding of the coming forward; rows of -1 route natively.
            measure: keep what `divergence` reports. Costs some elementwise work per router, no synchronisation.

        Raises:
            ValueError: routes that no router can have chosen (`check_routes`); reentrant checkpointing, which computes
                wrong gradients without an error if anything disarms before its re-forward.
            RuntimeError: inside of a recording.
        """
        if self._hooks.keep is not None:
            raise RuntimeError("cannot replay while recording: leave the record context first")
        self._refuse_reentrant()
        check_routes(routes, self.spec)
        self._hooks.armed = Armed(routes.detach().to(torch.int16), measure)
        if measure:
            self._measured = self._hooks.armed

    def _refuse_reentrant(self) -> None:
        for module in self._hooks.decoder.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and getattr(module, "gradient_checkpointing", False):
                if getattr(function, "keywords", {}).get("use_reentrant"):
                    raise ValueError(
                        "routing replay needs non-reentrant gradient checkpointing: "
                        "set gradient_checkpointing_kwargs={'use_reentrant': False}"
                    )
                return

    def disarm(self) -> None:
        """Route natively again."""
        self._hooks.armed = None

    @contextmanager
    def replay(self, routes: Tensor, measure: bool = False) -> Iterator[None]:
        """`arm` and, at the end, `disarm`. With gradients, ``backward`` belongs inside."""
        self.arm(routes, measure)
        try:
            yield
        finally:
            self.disarm()

    @property
    def armed_routes(self) -> Tensor | None:
        """``[B, S, L, k]`` that the next forward replays; None: it routes natively."""
        return None if self._hooks.armed is None else self._hooks.armed.by_row

    @contextmanager
    def packed(self, layout: Layout | None) -> Iterator[None]:
        """Inside, a forward runs the B rows of the batch as `layout` packs them (None: as they are).

        What is armed, recorded and measured stays by row and column. Routes that are armed stay packed afterwards: its
        backward pass may run layers again.
        """
        if (armed := self._hooks.armed) is not None and armed.layout is not layout:
            armed.lay(layout)
        self._hooks.layout = layout
        try:
            yield
        finally:
            self._hooks.layout = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the model routes natively, and nothing is recorded."""
        hooks = self._hooks
        armed, keep, hooks.armed, hooks.keep = hooks.armed, hooks.keep, None, None
        try:
            yield
        finally:
            hooks.armed, hooks.keep = armed, keep

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` of `torch.utils.checkpoint.checkpoint` (``use_reentrant=False``).

        The re-forward then replays what its forward replayed, or nothing if that was native, whatever is armed by
        then: for several forwards before one backward, or disarming before it.
        """
        return nullcontext(), self._hooks.pinned(self._hooks.armed)

    def divergence(self) -> Tensor:
        """What native routing would have done in the last forward armed with ``measure``.

        Returns:
            ``[B, S, L]`` int16: how many of the natively chosen experts the replayed row lacks, 0..k; -1 where the row
            was routed natively. For `srpo.replay.expert_table.flip_statistics`.

        Raises:
            RuntimeError: nothing was measured.
        """
        armed = self._measured
        if armed is None or len(armed.lost) < len(self.spec.layers):
            raise RuntimeError("no divergence: arm(routes, measure=True) and run a forward first")
        lost = [armed.lost[place] for place in range(len(self.spec.layers))]
        rows = torch.stack([one.to(lost[0].device) for one in lost], dim=-1).view(*armed.shape, -1)
        if armed.layout is None:
            return rows
        native = (armed.by_row[..., 0, 0] < 0).to(rows.device)  # padding
        return armed.layout.unpack(rows).masked_fill(native.unsqueeze(-1), NATIVE)

    # Recording

    @contextmanager
    def record_once(self) -> Iterator[None]:
        """Record one forward; a further one replaces it. Then `recorded`."""
        self._recorded = None

        def replace(routes: Tensor) -> None:
            self._recorded = routes

        with self._recording(replace):
            yield

    @contextmanager
    def record_rows(self) -> Iterator[RowRecorder]:
        """Record a decoding loop that calls the yielded recorder after each forward."""
        recorder = RowRecorder()
        with self._recording(recorder.put):
            yield recorder

    def recorded(self) -> Tensor:
        """Routes of the last `record_once`: int16 ``[B, S, L, k]`` on the CPU."""
        if self._recorded is None:
            raise RuntimeError("nothing recorded: no forward of this model ended in record_once()")
        return self._recorded.cpu()

    @contextmanager
    def _recording(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        if self._hooks.keep is not None or self._hooks.armed is not None:
            raise RuntimeError("cannot record " + ("twice at once" if self._hooks.keep else "while a replay is armed"))
        self._hooks.keep = keep
        try:
            yield
        finally:
            self._hooks.keep = None
