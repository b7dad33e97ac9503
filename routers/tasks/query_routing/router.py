"""A trained query router at work: a query in, the member that shall answer it out, with the probability of each.

    from routers import load_router
    with load_router("outputs/quickstart/router") as router:
        print(router.route("What is 17 + 25?"))

The policy writes its turn freely (greedily) up to the route tag; the member is then chosen among the pool's names, all
of which are scored (`srpo.rollout.constrained`). Evaluation, command line and server route by this one mechanism.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from routers.data.catalogue import Member
from routers.language.grammar import parse
from routers.language.prompts import stated_cost_weight
from routers.router import CannotDo, Decision, Router, RouterFile, check_queries, members_now
from routers.tasks.query_routing.settings import KIND, QuerySettings
from srpo.rollout.constrained import Node, OneOf, choice_probabilities
from srpo.rollout.generator import TransformersGenerator
from srpo.rollout.sampling_rules import Sampling
from srpo.rollout.shared import load_checkpoint
from srpo.rollout.special_tokens import end_ids
from srpo.rollout.turns import Request, Sample
from srpo.texts import LockedTokenizer, opened_by, text_of, without_control_tokens


class QueryRouter(Router):
    """Routes single queries. Safe in many threads: one decides at a time, `route_all` many queries together.

    Args:
        model, tokenizer: the policy, in evaluation mode.
        settings: how it was trained to be asked.
        members: the pool; None: that of the settings.
        max_batch: queries that are decided together.
        cache_tokens: of decisions under way, kept in the model's cache.
    """

    kind = KIND

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: QuerySettings,
        *,
        members: Sequence[Member] | None = None,
        max_batch: int = 32,
        cache_tokens: int = 65_536,
        name: str = "router",
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.cost_weights = settings, settings.cost_weights
        self.members = tuple(settings.members if members is None else members)
        self.name = name
        self._made_from = made_from
        self._model = model
        self._tokenizer = LockedTokenizer(tokenizer)
        self._clean = without_control_tokens(self._tokenizer)
        self._masks: dict[tuple[str, ...], OneOf] = {}
        self._numbers = itertools.count()
        self._mask(self.members)  # a name that cannot be written is an error now
        self._generator = TransformersGenerator(
            model,
            self._tokenizer,
            Sampling(temperature=0, stop=(settings.grammar.open(settings.grammar.route),)),
            eos_ids=end_ids(model, self._tokenizer),
            keep_tokens=cache_tokens,
        )
        self._max_batch = max_batch
        self._deciding = threading.Lock()

    @classmethod
    def load(
        cls,
        name: str,
        file: RouterFile,
        *,
        members: Sequence[str] | None = None,
        catalogue: str | Path | Mapping[str, Member] | None = None,
        **options: Any,
    ) -> QueryRouter:
        """See `routers.load_router`."""
        settings = file.settings_of(QuerySettings, KIND)
        pool = members_now(settings.members, members, catalogue)
        model, tokenizer = load_checkpoint(name)
        return cls(model, tokenizer, settings, members=pool, made_from=file.made_from, **options)

    def route(
        self,
        query: str,
        *,
        context: Any = None,
        cost_weight: float | None = None,
        members: Sequence[str] | None = None,
    ) -> Decision:
        """See `Router.route`. A policy that writes no route, or a broken turn, abstains; `text` shows it.

        Raises:
            CannotDo: a context; a query router reads the query alone.
            ValueError: an empty query, an unknown member, or a cost weight that was not trained.
        """
        if context is not None:
            raise CannotDo("a query router reads the query alone; leave context out")
        return self.route_all([query], cost_weight=cost_weight, members=members)[0]

    def route_all(
        self, queries: Sequence[str], *, cost_weight: float | None = None, members: Sequence[str] | None = None
    ) -> list[Decision]:
        """`route` for several, decided together."""
        check_queries(queries)
        pool = members_now(self.members, members)
        weight = stated_cost_weight(self.settings.cost_weights, cost_weight)
        found: list[Decision] = []
        for start in range(0, len(queries), self._max_batch):  # the caches of so many are kept at once
            found += self._decided(queries[start : start + self._max_batch], pool, weight)
        return found

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def save(self, folder: str | Path) -> None:
        """Weights, tokenizer and `router.yaml`, with the pool as it is now."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        self.settings.with_members(self.members).save(folder, self._made_from)

    def _mask(self, pool: Sequence[Member]) -> OneOf:
        names = tuple(member.name for member in pool)
        if names not in self._masks:
            self._masks[names] = self.settings.mask(self._tokenizer, pool)
        return self._masks[names]

    def _decided(self, queries: Sequence[str], pool: Sequence[Member], weight: float | None) -> list[Decision]:
        mask = self._mask(pool)
        prompts = [
            self._tokenizer.apply_chat_template(
                self.settings.messages(query, pool, cost_weight=weight, clean=self._clean),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self.settings.chat_template_kwargs,
            )
            for query in queries
        ]
        rows = [next(self._numbers) for _ in queries]
        wanted = [
            Request(row, tuple(prompt), "", self.settings.completion_tokens, allowed=mask.state())
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        # In the thread that asks: to wake another, and be woken, is a share of a small model's time.
        with self._deciding:
            turns = self._generate(wanted)
            begun = {n: found for n, turn in enumerate(turns) if (found := mask.inside(turn.ids)) is not None}
            forks = [(tree, [*prompts[n], *turns[n].ids[:length]], rows[n]) for n, (length, tree) in begun.items()]
            chosen = dict(zip(begun, choice_probabilities(self._generate, forks), strict=True))
            self._generator.over(rows)
        return [
            self._decision(prompts[n], list(turn.ids), begun.get(n), chosen.get(n, {}), mask, pool)
            for n, turn in enumerate(turns)
        ]

    def _generate(self, requests: Sequence[Request]) -> list[Sample]:
        parts = (requests[start : start + self._max_batch] for start in range(0, len(requests), self._max_batch))
        return [sample for part in parts for sample in self._generator.generate(part)]

    def _decision(
        self,
        prompt: Sequence[int],
        turn: list[int],
        begun: tuple[int, Node] | None,
        found: Mapping[str, float],
        mask: OneOf,
        pool: Sequence[Member],
    ) -> Decision:
        members = {member.name: member for member in pool}
        scores, chosen = {**dict.fromkeys(members, 0.0), **found}, None
        if begun is not None:
            length, tree = begun
            chosen = max(members, key=lambda name: scores[name])  # of equals the one that is shown first
            turn = [*turn[:length], *mask.spelling(tree, chosen)]
        text = opened_by(self._tokenizer, prompt) + text_of(self._tokenizer, turn)
        action = parse(text, members, self.settings.grammar)  # a broken turn routes nobody, as in training
        chosen = action.member
        return Decision(
            members=() if chosen is None else (chosen,),
            scores=scores,
            usd=0.0 if chosen is None else self.settings.expected_usd(members[chosen]),
            policy_usd=self.settings.policy_usd(len(prompt), len(turn)),
            prompt_tokens=len(prompt),
            completion_tokens=len(turn),
            text=text,
            error=action.error,
        )


@contextmanager
def routing(model: Any, tokenizer: Any, settings: QuerySettings, **options: Any) -> Iterator[QueryRouter]:
    """A router around a policy that is being trained: its mode (train or eval) is given back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with QueryRouter(model, tokenizer, settings, **options) as router:
            yield router
    finally:
        model.train(was_training)
