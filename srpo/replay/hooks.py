"""The hooks behind `srpo.replay.replay`: on each router of a model, and around the model that holds them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from srpo.prefix.tree import Layout
from srpo.replay.expert_table import NATIVE, RouterSpec
from srpo.replay.families import find_routers

_TOPK = (torch.topk, Tensor.topk)
_MASK = (torch.masked_fill, Tensor.masked_fill)


@dataclass
class Armed:
    """Routes of one micro-batch: `routes` int16 [L, N, k]; if `measure`, `lost` [N] by router, see `divergence`.

    Looked up and written by layer, so that a re-forward finds the same routes and writes the same numbers again.
    The N tokens are those of the last forward: rows by columns, or as it packed them.
    """

    by_row: Tensor
    """[B, S, L, k], as they were given."""
    measure: bool
    lost: dict[int, Tensor] = field(default_factory=dict)
    layout: Layout | None = None
    routes: Tensor = field(init=False)
    shape: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.lay(None)

    def lay(self, layout: Layout | None) -> None:
        """The coming forward runs tokens as `layout` packs them; None: as they are."""
        routes = self.by_row if layout is None else layout.pack(self.by_row + 1) - 1  # NATIVE beyond the tokens
        self.layout, self.shape = layout, (routes.size(0), routes.size(1))
        self.routes = routes.permute(2, 0, 1, 3).reshape(routes.size(2), -1, routes.size(3))


class Selection(TorchFunctionMode):
    """Watches one call of one router; the one ``topk`` that selects experts is recorded or replaced."""

    def __init__(self, router: nn.Module, place: int, spec: RouterSpec, armed: Armed | None) -> None:
        super().__init__()
        self.router, self.place, self.spec, self.armed = router, place, spec, armed
        self.times = 0
        self.native: Tensor
        self._masked: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _MASK:
            self._masked = (result, args[0])
        elif func in _TOPK:
            scores = args[0] if args else kwargs["input"]
            k = args[1] if len(args) > 1 else kwargs["k"]
            # Group-limited families also choose groups, and the two best experts within each group (3-D).
            if scores.dim() == 2 and (scores.shape[-1], k) == (self.spec.num_experts, self.spec.top_k):
                return self._select(scores, result)
        return result

    def _select(self, scores: Tensor, result: Any) -> Any:
        self.times += 1
        self.native = result[1].detach()
        if self.armed is None:
            return result
        routes = self.armed.routes[self.place].to(scores.device, torch.int64)
        if len(routes) != len(scores):
            raise ValueError(f"routes for {len(routes)} tokens are armed, but a router sees {len(scores)}")
        holes = routes < 0
        chosen = torch.where(holes, self.native, routes)
        if self.armed.measure:
            lost = (self.native[:, :, None] != chosen[:, None, :]).all(-1).sum(-1)
            self.armed.lost[self.place] = torch.where(holes[:, 0], NATIVE, lost).to(torch.int16)
        if self._masked is not None and self._masked[0] is scores:
            # DeepSeek-V2 zeroes the scores outside of today's best groups and uses what is left as weights. Replayed
            # experts bring their own groups: their weights are the scores before that mask.
            scores = self._masked[1]
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))


class RouterHooks:
    """Hooks that do nothing until `armed` or `keep` is set.

    Attributes:
        spec: what the model's routes look like.
        armed: routes to replay. A plain attribute, visible in the threads in which autograd runs a layer again.
        keep: called with the routes ``[B, S, L, k]`` of each finished forward.
        layout: how the coming forward packs its tokens; None: not at all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.decoder, self._routers, self.spec = find_routers(model)
        self.armed: Armed | None = None
        self.keep: Callable[[Tensor], None] | None = None
        self.layout: Layout | None = None
        self._thread = threading.local()  # `selection`: modes are per thread; `pinned`: a re-forward's own routes
        self._fired: dict[int, Tensor] = {}
        self._columns = (0, 0)
        self.handles = self._install()

    @contextmanager
    def pinned(self, armed: Armed | None) -> Iterator[None]:
        """Inside, this thread replays `armed`, whatever is armed: a re-forward runs in one thread from end to end."""
        self._thread.pinned = armed
        try:
            yield
        finally:
            del self._thread.pinned

    def _install(self) -> list[Any]:
        # Functions, not bound methods: copying a model copies its hooks, and with a bound method this object and
        # everything it holds. The identity tests keep a copy (a teacher, a reference) from using our state.
        def before_model(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module is self.decoder and (self.keep or self.armed):
                self._before_model(args, kwargs)

        def after_model(module: nn.Module, args: Any, output: Any) -> None:
            if module is self.decoder and (self.keep or self.armed):
                self._after_model()

        def before_router(module: nn.Module, args: Any) -> None:
            if (self.keep or self.armed or hasattr(self._thread, "pinned")) and module in index:
                self._before_router(module, index[module])

        def after_router(module: nn.Module, args: Any, output: Any) -> None:
            selection = getattr(self._thread, "selection", None)
            if selection is not None and selection.router is module:
                self._after_router(selection, output is not None)

        index = {module: place for place, modules in enumerate(self._routers) for module in modules}
        handles: list[Any] = [
            self.decoder.register_forward_pre_hook(before_model, with_kwargs=True),
            self.decoder.register_forward_hook(after_model),
        ]
        for router in index:
            handles.append(router.register_forward_pre_hook(before_router))
            # always_call: also when the router raises, or checkpointing stops a re-forward early.
            handles.append(router.register_forward_hook(after_router, always_call=True))
        return handles

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        tokens = next(one for one in inputs if isinstance(one, Tensor))
        self._fired = {}
        self._columns = (tokens.shape[0], tokens.shape[1])
        if self.keep is not None:
            if "write_index" in kwargs:
                raise RuntimeError("continuous batching packs sequences into one row: routes cannot be told apart")
        elif self.armed is not None:
            if self.armed.shape != self._columns:
                raise ValueError(f"routes of {self.armed.shape} are armed for a forward of {self._columns} tokens")
            # Moved once for all layers; the object stays, because a checkpoint may already hold it.
            self.armed.routes = self.armed.routes.to(tokens.device, non_blocking=True)

    def _after_model(self) -> None:
        silent = [self.spec.layers[place] for place in range(len(self._routers)) if place not in self._fired]
        if silent:
            raise RuntimeError(
                f"the routers of layers {silent} did not run in this forward: a fused kernel bypasses them "
                "(use_kernels, MXFP4), adapters are switched off, or PEFT copied a router after the hooks came"
            )
        if self.keep is not None:
            routes = torch.stack([self._fired[place] for place in range(len(self._routers))], dim=1)
            routes = routes.view(*self._columns, *routes.shape[1:])
            self.keep(routes if self.layout is None else self.layout.unpack(routes))

    def _before_router(self, router: nn.Module, place: int) -> None:
        selection = Selection(router, place, self.spec, getattr(self._thread, "pinned", self.armed))
        selection.__enter__()
        self._thread.selection = selection  # modes are per thread too

    def _after_router(self, selection: Selection, finished: bool) -> None:
        selection.__exit__(None, None, None)
        self._thread.selection = None
        if not finished:
            return  # an exception is on its way
        if selection.times != 1:
            raise RuntimeError(
                f"{type(selection.router).__name__} called topk(k={self.spec.top_k}) over {self.spec.num_experts} "
                f"experts {selection.times} times, expected once: routing replay does not support this family"
            )
        self._fired[selection.place] = selection.native.to(torch.int16)
