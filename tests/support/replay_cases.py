"""A mixture of experts of 20,000 parameters in real trainers, and a spy on the experts that knows nothing of replay.

The spy writes down which experts each module was told to run, for which tokens and in which pass. A token is named by
the ids up to it, so that passes in different paddings, orders and batches can be compared.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from core_helpers import config as core_config
from core_helpers import digest, tokenizer, trainer

from srpo.scratch_lm import tiny_moe_lm

LAYERS, EXPERTS, TOP_K = 2, 8, 2
Experts = tuple[frozenset[int], ...]  # one set per layer


def moe(seed: int = 0, scale: float = 4.0, **changes: Any) -> Any:
    """Scaled up, so that distributions are peaked and a step of SGD moves the routing."""
    settings = {"hidden": 32, "layers": LAYERS, "heads": 2, "experts": EXPERTS, "top_k": TOP_K, "intermediate": 16}
    network = tiny_moe_lm(tokenizer(), **{**settings, **changes}, seed=seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return network


def config(folder: Path | str, **changes: Any) -> Any:
    """Two optimiser steps per rollout, large ones; no audits, so that every forward is one of the training's own."""
    settings = {
        "objective": "grpo",
        "loss_type": "dr_grpo",
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "max_steps": 4,
        "learning_rate": 0.5,
        "routing_replay": "R3",
        "routing_replay_metrics_steps": 0,
        "distillation_topk": 8,
    }
    return core_config(folder, **{**settings, **changes})


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(digest(ids) % 3 == 0) for ids in completion_ids]


def made(folder: Path | str, network: Any = None, **changes: Any) -> Any:
    kwargs = {name: changes.pop(name) for name in tuple(changes) if name in ("peft_config", "environment")}
    kwargs.setdefault("rollout_func", changes.pop("rollout_func", None))
    return trainer(config(folder, **changes), moe() if network is None else network, reward, **kwargs)


class Spy:
    """Passes of a trainer's policy, by name: `rollout`, `score` (no gradient), `policy`, `eval`, `again` (re-forward);
    `before` the first rollout.

    Attributes:
        seen: pass -> one dict per forward: tokens up to a place -> the experts that ran there. In `rollout` one dict
            per generation.
        layers: pass -> per call of an experts module its layer and [tokens, k]; all that a re-forward can show.
    """

    def __init__(self, run: Any, model: Any = None):
        self.run = run
        self.seen: dict[str, list[dict[tuple[int, ...], Experts]]] = defaultdict(list)
        self.layers: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        self._generating = self._began = False
        model = run.model if model is None else model
        self._fed: tuple[Any, Any] = ((), ())
        self._rows: dict[int, dict[int, int]] = {}
        self._pending: dict[int, torch.Tensor] = {}
        decoder = next(m for m in model.modules() if type(m).__name__ == "Qwen3MoeModel")
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._end, with_kwargs=True)
        for place, layer in enumerate(decoder.layers):
            layer.mlp.experts.register_forward_pre_hook(self._experts(place), with_kwargs=True)
        inner, whole = run._generate_single_turn, run._generate_and_score_completions

        def generate(*args: Any, **kwargs: Any) -> Any:
            self._generating, self._rows = True, {}
            self.seen["rollout"].append({})
            try:
                return inner(*args, **kwargs)
            finally:
                self._generating = False

        def begin(inputs: Any) -> Any:
            self._began = True
            return whole(inputs)

        run._generate_single_turn, run._generate_and_score_completions = generate, begin
        make = run.sampler.make_generator

        def watched(*args: Any, recorder: Any = None, **how: Any) -> Any:
            def told(rows: list[tuple[int, ...]], positions: torch.Tensor) -> None:
                if recorder is not None:
                    recorder(rows, positions)
                self._told(rows, positions)

            return make(*args, recorder=told, **how)

        run.sampler.make_generator = watched

    def _pass(self) -> str:
        if self._generating:
            return "rollout"
        if not self._began:
            return "before"  # a trainer measures noise before its first rollout (srpo.trainer.forward_checks)
        if torch._C._current_graph_task_id() != -1:
            return "again"
        if torch.is_grad_enabled():
            return "policy"
        return "score" if self.run.model.training else "eval"

    def _begin(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self._pending = {}

    def _experts(self, place: int) -> Any:
        def look(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            (ids,) = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.dtype == torch.int64]
            self._pending[place] = ids.clone()
            self.layers[self._pass()].append((place, ids.clone()))

        return look

    def _end(self, _module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        name, ids, mask = self._pass(), kwargs["input_ids"], kwargs["attention_mask"]
        batch, columns = ids.shape
        experts = torch.stack([self._pending[place] for place in range(LAYERS)], dim=1)
        experts = experts.view(batch, columns, LAYERS, TOP_K).tolist()
        if name == "rollout":
            self._fed = ids.tolist(), experts
            return
        self.seen[name].append({})
        table = self.seen[name][-1]
        if mask.dim() == 4:
            self._packed(table, ids, mask, experts)
            return
        for row, real, chosen in zip(ids.tolist(), mask[:, -columns:].tolist(), experts, strict=True):
            whole: list[int] = []
            for token, is_real, one in zip(row, real, chosen, strict=True):
                if is_real:
                    whole.append(token)
                    table[tuple(whole)] = tuple(frozenset(layer) for layer in one)
            # The last token is never fed while sampling, and what it routes to influences nothing.
            table.pop(tuple(whole), None)

    def _packed(self, table: dict[tuple[int, ...], Experts], ids: Any, mask: Any, experts: Any) -> None:
        """Rows that share their beginnings: before a token are the columns that it sees, whatever laid them out."""
        seen = (mask if mask.dtype == torch.bool else mask == 0).expand(len(ids), -1, -1, -1)[:, 0]
        for row, sees, chosen in zip(ids, seen, experts, strict=True):
            leads_on = sees.sum(dim=0) > 1  # others see it: neither the last token of a row nor a filler
            for column in leads_on.nonzero().flatten().tolist():
                table[tuple(row[sees[column]].tolist())] = tuple(frozenset(layer) for layer in chosen[column])

    def _told(self, rows: list[tuple[int, ...]], positions: torch.Tensor) -> None:
        """What the last forward of a rollout was; nothing where another model or an environment's turn ran."""
        if not self._generating or not self._fed[0]:
            return
        for owners, places, tokens, chosen in zip(rows, positions.tolist(), *self._fed, strict=True):
            for row in owners:
                whole = self._rows.setdefault(row, {})
                for place, token, one in zip(places, tokens, chosen, strict=True):
                    if place >= 0:
                        whole[place] = token
                        before = tuple(whole[n] for n in range(place + 1))
                        self.seen["rollout"][-1][before] = tuple(frozenset(layer) for layer in one)


def agreement(a: dict[tuple[int, ...], Experts], b: dict[tuple[int, ...], Experts]) -> tuple[int, int]:
    """Tokens that both passes ran, and how many of them with the same experts in all layers."""
    shared = a.keys() & b.keys()
    return len(shared), sum(a[token] == b[token] for token in shared)
