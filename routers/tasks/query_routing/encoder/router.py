"""An encoder policy at work, as the other routers of queries are: `load_router(FOLDER).route(QUERY)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from routers.data.catalogue import Member
from routers.router import (
    CannotDo,
    Decision,
    Router,
    RouterFile,
    check_queries,
    members_now,
    plain_settings,
    write_router,
)
from routers.tasks.query_routing.encoder.model import EncoderPolicy, capabilities
from routers.tasks.query_routing.settings import QuerySettings

KIND = "encoder_routing"


class EncoderRouter(Router):
    """Routes single queries; safe in many threads at once.

    Args:
        model: the policy.
        settings: the pool of its training and what calls cost there.
        members: the pool now; None: that of the settings. One that the model does not know counts as an average
            member at its own prices, until `learn_member` tells what it did on some queries.

    Raises:
        ValueError: a member has other prices than in training, and nothing says what its calls cost at them.
    """

    kind = KIND

    def __init__(
        self,
        model: EncoderPolicy,
        settings: QuerySettings,
        *,
        members: Sequence[Member] | None = None,
        name: str = "encoder",
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.settings, self.name, self.made_from = model.eval(), settings, name, made_from
        self.members = tuple(settings.members)
        if members is not None:
            self._pool(tuple(members))

    @classmethod
    def load(
        cls,
        name: str,
        file: RouterFile,
        *,
        members: Sequence[str] | None = None,
        catalogue: str | Path | Mapping[str, Member] | None = None,
        **options: Any,
    ) -> EncoderRouter:
        """See `routers.load_router`."""
        settings = file.settings_of(QuerySettings, KIND)
        pool = members_now(settings.members, members, catalogue)
        return cls(EncoderPolicy.from_pretrained(name), settings, members=pool, made_from=file.made_from, **options)

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        """See `Router.route`. Any cost weight from 0 on may be asked for: it enters by a formula.

        Raises:
            CannotDo: a context; a router of queries reads the query alone.
            ValueError: an empty query, an unknown member, or a negative cost weight.
        """
        if context is not None:
            raise CannotDo("a query router reads the query alone; leave context out")
        return self.route_all([query], cost_weight=cost_weight, members=members)[0]

    @torch.no_grad()
    def route_all(
        self, queries: Sequence[str], *, cost_weight: float | None = None, members: Sequence[str] | None = None
    ) -> list[Decision]:
        """`route` for several, decided together."""
        check_queries(queries)
        if cost_weight is not None and not cost_weight >= 0:
            raise ValueError(f"cost_weight is {cost_weight!r}; it must be at least 0")
        if not queries:
            return []
        return self.decide(self.model.embed(queries), cost_weight, members)

    @torch.no_grad()
    def decide(
        self, embedded: torch.Tensor, cost_weight: float | None = None, members: Sequence[str] | None = None
    ) -> list[Decision]:
        """`route_all` of queries that the model has embedded."""
        chosen = {member.name for member in members_now(self.members, members)}
        names = [member.name for member in self.members]
        weight = self.settings.cost_weights[0] if cost_weight is None else cost_weight
        allowed = torch.tensor([name in chosen for name in names])
        found = self.model(embedded, torch.full((len(embedded),), weight), allowed=allowed).exp().tolist()
        return [self._decision(dict(zip(names, row, strict=False)), row[len(names) :], chosen) for row in found]

    def learn_member(
        self, member: Member, queries: Sequence[str], score: Sequence[float], usd: Sequence[float]
    ) -> None:
        """Tell what a member did on some queries: its capability is fitted, and the policy stays as it is."""
        outcomes = torch.tensor([list(score), [x / self.model.config.cost_scale for x in usd]]).unsqueeze(-1)
        capability, _ = capabilities(self.model.embed(queries), outcomes)
        others = tuple(one for one in self.members if one.name != member.name)
        self._pool((*others, member), {member.name: capability[:, 0]})
        typical = {**self.settings.typical_usd, member.name: sum(usd) / len(usd)}
        self.settings = replace(self.settings, members=self.members, typical_usd=typical)

    def save(self, folder: str | Path) -> None:
        """Weights and `router.yaml`, with the pool as it is now."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.save_settings(folder)

    def save_settings(self, folder: str | Path) -> None:
        """`router.yaml` alone."""
        write_router(folder, KIND, plain_settings(self.settings.with_members(self.members)), self.made_from)

    @torch.no_grad()
    def _pool(self, members: tuple[Member, ...], told: Mapping[str, Any] | None = None) -> None:
        """Make the model's rows those of a pool: known members', at their prices now; the average for new ones."""
        model, settings = self.model, self.settings
        known = dict(zip(model.config.members, model.capability.unbind(dim=1), strict=True)) | dict(told or {})
        average = model.capability.mean(dim=1)
        rows = []
        for member in members:
            row = known.get(member.name, average).clone()
            usd, before = settings.expected_usd(member), settings.typical_usd.get(member.name)
            if usd is None and before is not None and member.name not in (told or {}):
                raise ValueError(
                    f"{member.name} has other prices than in training, and the router does not know how long its "
                    "calls are: train it on a table that counts tokens, or leave its prices as they were"
                )
            if before is None:
                before = sum(settings.typical_usd.values()) / max(1, len(settings.typical_usd))
            if usd is not None and member.name not in (told or {}):
                if before:
                    row[1] *= usd / before
                else:
                    row[1, -1] += usd / model.config.cost_scale
            rows.append(row)
        model.capability = torch.stack(rows, dim=1)
        model.features = model.described(members, model.capability)
        model.config.members = [member.name for member in members]
        self.members = members

    def _decision(self, scores: dict[str, float], abstain: list[float], chosen: set[str]) -> Decision:
        best = max((name for name in scores if name in chosen), key=lambda name: scores[name])
        scores = {name: scores[name] for name in scores if name in chosen}
        if abstain and abstain[0] > scores[best]:
            return Decision((), scores, usd=0.0, text="", error=f"abstains, with probability {abstain[0]:.3f}")
        member = next(one for one in self.members if one.name == best)
        return Decision((best,), scores, usd=self.settings.expected_usd(member))
