"""A step router in front of agents that speak OpenAI's messages: a decision per call, a budget per conversation.

    conversations = Conversations(router, cap=0.50, unit="usd")
    call = await conversations.decide(messages, tools, owner=key, conversation=id_or_None, bounds=bounds)
    while call.member is not None:                           # None: `call.reason` says why nobody may answer
        reply = ...                                          # ask call.member; keep it below bounds[call.member]
        if reply.ok:
            conversations.settle(call, usd=reply.usd)        # before the last byte goes to the client
            break
        call = conversations.instead(call, reply.error, usd=reply.usd)      # failover: the next likeliest that fits

Contract with a server. Exactly one of `settle` or `instead` follows every decision with a member, in a `finally` for
a client that leaves (``settle(call, error="the client left")``: without `usd` it costs its whole bound). `bounds` are
USD that the call costs at most at each member; they may be left out where the budget counts calls. Everything may be
called from any thread or task.

Which conversation a call belongs to. By the id that the client gives; else by its messages: a request continues the
conversation whose earlier request is its longest proper prefix (a chain of hashes; prompt-cache marks and the two ways
to write a text do not matter). `owner` is a part of both: two keys never share a conversation. A request that is asked
again word for word (a retry) is decided from the same state as before, hence alike, and both are paid by the same
budget; so are branches. Conversations of one owner that begin word for word alike *at the same time* share a budget,
which ids avoid; after the first has gone on, the same beginning is a new one. Who changes what was said before (a
clock in the system message, a history that is trimmed) must give an id.

What the policy reads is the digest of every request (`routers.language.digest`), as in training, token for token.
After `step_limit` decisions, as many as an episode of the training has, it reads the conversation anew from there; the
budget goes on. What no longer fits into the budget cannot be chosen; when nothing fits there is no member.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from routers.data.catalogue import Member
from routers.data.prompt_cache import Conversation as PromptCaches
from routers.data.prompt_cache import estimated_messages, expected_usd
from routers.language.digest import Digest, digest
from routers.pool.ledger import Account
from routers.router import CannotDo
from routers.tasks.step_routing.arguments import Unit
from routers.tasks.step_routing.kept import Entry, Kept, Point, hashes
from routers.tasks.step_routing.session import StepSession, StepState
from routers.tasks.step_routing.settings import StepSettings
from srpo.texts import well_formed

Reason = Literal["policy", "sticky", "failover", "budget", "failed"]
"""policy: its own choice. sticky: a switch would have cost more than it brings. failover: who was asked before failed.
Without a member, budget: nothing fits; failed: everybody who fits has failed."""
_KEPT = 4
"""Calls of a conversation of which the state is kept, the latest: for retries, branches and ids."""
_LONGEST_ID = 256


class Sessions(Protocol):
    """What is used of a router: `StepRouter`, or a rule (`rules.RuleRouter`)."""

    settings: StepSettings

    def session(
        self,
        task: str = "",
        cap: float | None = None,
        *,
        unit: Unit | None = None,
        seed: str | None = None,
        step_limit: int | None = None,
        state: StepState | None = None,
        account: Account | None = None,
    ) -> StepSession: ...


@dataclass
class _Conversation:
    """One conversation: its money, and where it stood after its last calls."""

    name: str
    key: tuple[str, str]
    """(owner, name)."""
    account: Account
    used: float
    first: bytes
    """Hash of the request that began it."""
    listed: bool
    """It is found by its messages."""
    points: OrderedDict[bytes, Point] = field(default_factory=OrderedDict)
    """By hash of a request, the latest last."""
    open: int = 0
    calls: int = 0
    usd: float = 0.0


@dataclass(frozen=True)
class Call:
    """The decision about one call of an agent."""

    member: str | None
    reason: Reason
    scores: Mapping[str, float]
    """Probability of each member that could be chosen; they sum to 1."""
    conversation: str
    """Its id: a client that sends it continues this conversation, whatever its messages say."""
    number: int
    """Of the decision in its conversation, from 1; retries count."""
    spent_usd: float
    """By the conversation's calls that are over."""
    remaining: float
    """Of its budget, in the budget's unit, this call's reservation off; infinite without a cap."""
    policy_usd: float
    prompt_tokens: int
    completion_tokens: int
    """What this decision cost, and what the policy read and wrote for it."""
    expected_usd: Mapping[str, float] = field(default_factory=dict)
    """What the prompt of this call costs at each member, by what it has in its cache; empty without `members`."""
    failed: tuple[str, ...] = ()
    """Who was asked before, for this call, and failed."""
    _session: StepSession | None = field(default=None, repr=False, compare=False)
    _home: _Conversation | None = field(default=None, repr=False, compare=False)
    _request: bytes = field(default=b"", repr=False, compare=False)
    _caches: PromptCaches = field(default=PromptCaches(), repr=False, compare=False)
    """Before it."""


class Conversations:
    """Decides the calls of many agents at once; see above.

    Args:
        router: decides; stays the caller's to close.
        cap: hard limit of a conversation in `unit`; None: no limit.
        unit: usd or large_calls; None: the one that the policy was trained with.
        members: with their prices, of the router's: what the next prompt will cost at each of them, by what is in its
            prompt cache (`routers.data.prompt_cache`, in estimated tokens). None: nothing is said about that.
        worth_usd: makes choices sticky. What certainty is worth: the policy's choice m replaces the member l of the
            call before only if worth_usd x (p(m) - p(l)) > expected(m) - expected(l), in USD of this call's prompt: a
            member that has to read all of it again is dearer than one that has it in its cache. None: the policy alone
            decides, which knows such prices if it was trained with them. INFERRED.
        max_conversations: kept at once. Beyond it the owner with the most loses its least recently used one, whose
            budget then begins anew: `counts()` says how often ("evicted").
        idle_seconds: after so long without a call a conversation is forgotten ("expired").
        kept: where they outlive this process, within the same limits of number and age; closed by `close`. None:
            nowhere.
        clock: seconds; None: of this machine, or since 1970 where conversations are kept.

    Raises:
        CannotDo: a policy that reads ALFWorld's words only.
        ValueError: a number out of its range, or a file that cannot be read.
    """

    def __init__(
        self,
        router: Sessions,
        *,
        cap: float | None = None,
        unit: Unit | None = None,
        members: Mapping[str, Member] | None = None,
        worth_usd: float | None = None,
        max_conversations: int = 4_096,
        idle_seconds: float = 3600.0,
        kept: Kept | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if router.settings.observation == "compact":
            raise CannotDo(
                "this policy reads ALFWorld's `compact` words and no messages: train one with observation: signs or "
                "digest"
            )
        if max_conversations < 1 or not idle_seconds > 0:
            raise ValueError(f"max_conversations={max_conversations}, idle_seconds={idle_seconds}: both must be > 0")
        if worth_usd is not None and not (math.isfinite(worth_usd) and worth_usd >= 0):
            raise ValueError(f"worth_usd is {worth_usd}; it must be a number of USD >= 0")
        missing = [] if members is None else [name for name in router.settings.executors if name not in members]
        if missing or (worth_usd is not None and members is None):
            raise ValueError(f"worth_usd needs the prices of every member: members has none of {missing or 'them'}")
        self._members = {} if members is None else {name: members[name] for name in router.settings.executors}
        self.router = router
        self.cap, self.unit = cap, unit or router.settings.unit
        self._worth, self._most, self._idle = worth_usd, max_conversations, idle_seconds
        self._kept = kept
        self._clock = clock or (time.monotonic if kept is None else time.time)
        router.settings.budget(cap, unit)
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], _Conversation] = OrderedDict()  # the latest used last
        self._owners: Counter[str] = Counter()
        self._requests: dict[bytes, _Conversation] = {}  # by hash, of those that are listed; the latest of two wins
        self._counts: Counter[str] = Counter()
        for entry in () if kept is None else kept.entries():
            self._restore(entry)

    async def decide(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        owner: str = "",
        conversation: str | None = None,
        bounds: Mapping[str, float] | None = None,
        among: Collection[str] | None = None,
        read: Digest | None = None,
    ) -> Call:
        """Who answers this call; its bound is reserved until `settle` or `instead`.

        Args:
            messages, tools: of the request, as they are.
            owner: whose request it is: a name of the client's key.
            conversation: id that the client gave; None: its messages say.
            bounds: USD that the call costs at most, of every member.
            among: only these can answer (tools, images, `max_cost_usd`); None: all. None of them fits: "budget".
            read: their digest, where somebody has made it already.

        Raises:
            ValueError: no messages, messages that are no JSON, bounds that are not one number >= 0 per member, `among`
                without a member of the router.
            RuntimeError: the router was closed.
        """
        names = self.router.settings.executors
        if among is not None and not set(among) & set(names):
            raise ValueError(f"none of the router's members ({', '.join(names)}) can answer this request")
        if not messages:
            raise ValueError("there are no messages")
        if conversation is not None and not 0 < len(conversation) <= _LONGEST_ID:
            raise ValueError(f"the id of a conversation has 1 to {_LONGEST_ID} characters")
        if conversation is not None and well_formed(conversation) != conversation:
            raise ValueError("the id of a conversation holds half of a surrogate pair, which is no character")
        told, chain = read or digest(messages, tools), hashes(messages, owner)
        home, state, caches = self._find(chain, owner, conversation)
        try:
            if self._members:
                caches = caches.then(estimated_messages([*(tools or ()), *messages]), max(self._clock(), caches.now))
            usd = {name: expected_usd(member, caches) for name, member in self._members.items()}
            session, restarted = self._session(home, state, told)
            prefer = self._sticky(session, usd)
            decision = await session.adecide(told.text, bounds, score=0.0, among=among, prefer=prefer)
        except BaseException:
            with self._lock:
                home.open -= 1
            raise
        with self._lock:
            self._counts.update({"decided": 1, "restarted": int(restarted)})
            home.calls += 1
            if decision.member is None:
                home.open -= 1
                self._counts["refused"] += 1
            else:
                self._keep(home, chain[-1], Point(state, session.state, caches.asked(decision.member)))
            kept = prefer is not None and prefer.kept
            self._counts["sticky"] += kept
            reason: Reason = "budget" if decision.member is None else "sticky" if kept else "policy"
            return Call(
                decision.member,
                reason,
                decision.scores,
                home.name,
                home.calls,
                home.usd,
                home.account.available,
                decision.policy_usd,
                decision.prompt_tokens,
                decision.completion_tokens,
                usd,
                _session=session,
                _home=home,
                _request=chain[-1],
                _caches=caches,
            )

    def settle(self, call: Call, usd: float | None = None, error: str | None = None) -> None:
        """The call is over.

        Args:
            usd: what it cost; None, or what is not a number >= 0: its whole bound.
            error: why it failed, where it did and nobody else is to be asked.

        Raises:
            RuntimeError: it has no member, or was settled before.
        """
        session, home = _open(call)
        before = session.executor_usd
        session.paid(math.nan if usd is None else usd, error=error)
        with self._lock:
            home.open -= 1
            home.usd += session.executor_usd - before
            if error is None:
                self._write(home)
            else:
                self._failed(home, call)
            self._counts["settled" if error is None else "failed"] += 1

    def instead(self, call: Call, error: str, usd: float | None = None) -> Call:
        """The member failed: who answers in its place, the likeliest that was not asked and still fits.

        Returns:
            The same call with another member, which is to be settled in its turn; or with none, and settled.

        Raises:
            RuntimeError: as `settle`.
        """
        session, home = _open(call)
        failed = (*call.failed, str(call.member))
        before = session.executor_usd
        rest = {name: score for name, score in call.scores.items() if name not in failed}
        member = session.instead(rest, error, math.nan if usd is None else usd)
        with self._lock:
            home.usd += session.executor_usd - before
            self._counts["failed"] += 1
            if member is None:
                home.open -= 1
            else:
                self._counts["failover"] += 1
            self._failed(home, call, member)
            more = {"spent_usd": home.usd, "remaining": home.account.available, "failed": failed}
        return replace(call, member=member, reason="failed" if member is None else "failover", **more)  # type: ignore[arg-type]

    def close(self) -> None:
        """Close the file, if there is one; the router stays open."""
        if self._kept is not None:
            self._kept.close()

    def counts(self) -> dict[str, int]:
        """Events since the start: decided, settled, failed (calls of members), failover, sticky, refused (budget),
        begun, retried, branched, rewritten (known by their id only), restarted, expired, evicted, abandoned (forgotten
        with a call open), restored (out of the file); and `open` conversations now."""
        names = (
            "decided settled failed failover sticky refused begun retried branched rewritten restarted expired "
            "evicted abandoned restored"
        )
        with self._lock:
            return {**{name: self._counts[name] for name in names.split()}, "open": len(self._known)}

    def _find(
        self, chain: Sequence[bytes], owner: str, given: str | None
    ) -> tuple[_Conversation, StepState, PromptCaches]:
        """The conversation of a request, and where it stands for it. Its call counts as open."""
        with self._lock:
            now = self._clock()
            while self._known and now - (oldest := next(iter(self._known.values()))).used > self._idle:
                self._forget(oldest, "expired")
            home = self._by_messages(chain) if given is None else self._known.get((owner, given))
            if home is None:
                home, state = self._begin(owner, given, chain[-1], now), StepState()
            else:
                state = self._state(home, chain, given is not None)
            latest = next(reversed(home.points), b"")
            caches = home.points[latest].caches if latest else PromptCaches()
            home.used = now
            home.open += 1
            self._known.move_to_end(home.key)
            return home, state, caches

    def _by_messages(self, chain: Sequence[bytes]) -> _Conversation | None:
        for request in reversed(chain[:-1]):
            if (found := self._requests.get(request)) is not None:
                return found
        found = self._requests.get(chain[-1])
        gone_on = found is not None and found.points and next(reversed(found.points)) != chain[-1]
        return None if gone_on else found

    def _state(self, home: _Conversation, chain: Sequence[bytes], by_id: bool) -> StepState:
        """Before a retry the state is that of the first try; else the one after the longest known beginning."""
        if (known := home.points.get(chain[-1])) is not None:
            self._counts["retried"] += 1
            return known.before
        latest = next(reversed(home.points), b"")
        for request in reversed(chain[:-1]):
            if (point := home.points.get(request)) is not None:
                self._counts["branched"] += request != latest
                return point.after
        if by_id and latest:
            self._counts["rewritten"] += 1
            return home.points[latest].after
        return StepState()

    def _begin(self, owner: str, given: str | None, request: bytes, now: float) -> _Conversation:
        if len(self._known) >= self._most:
            largest = max(self._owners.values())
            victim = next(c for c in self._known.values() if self._owners[c.key[0]] == largest)
            self._forget(victim, "evicted")
        name = uuid.uuid4().hex if given is None else given
        home = _Conversation(name, (owner, name), Account(self.cap), now, request, given is None)
        self._known[home.key] = home
        self._owners[owner] += 1
        self._counts["begun"] += 1
        if home.listed:
            self._requests[request] = home
        return home

    def _keep(self, home: _Conversation, request: bytes, point: Point) -> None:
        if self._known.get(home.key) is not home:  # forgotten meanwhile
            return
        home.points[request] = point
        home.points.move_to_end(request)
        if home.listed:
            self._requests[request] = home
        gone = []
        while len(home.points) > _KEPT:
            old, _ = home.points.popitem(last=False)
            self._unlist(home, old)
            gone.append(old)
        self._write(home, request, gone)

    def _failed(self, home: _Conversation, call: Call, instead: str | None = None) -> None:
        """A call's prompt is in no cache (see `routers.data.prompt_cache`), or in that of who is asked instead."""
        if (point := home.points.get(call._request)) is not None:
            caches = call._caches if instead is None else call._caches.asked(instead)
            after = point.after if instead is None or call._session is None else call._session.state
            home.points[call._request] = Point(point.before, after, caches)
        self._write(home, call._request)

    def _write(self, home: _Conversation, request: bytes = b"", gone: Sequence[bytes] = ()) -> None:
        """Its money, what is set aside as spent, and the point of a request: before anybody is asked for it."""
        if self._kept is None or self._known.get(home.key) is not home:
            return
        held = home.account.spent + home.account.reserved + home.account.overrun
        points = [(request, home.points[request])] if request in home.points else []
        known = (home.key, home.used, home.first, home.listed, held, home.usd, home.calls)
        self._kept.put(Entry(*known, points), gone)

    def _restore(self, entry: Entry) -> None:
        """A conversation of an earlier server; of too many, the one that was used longest ago goes."""
        home = _Conversation(
            entry.key[1], entry.key, Account(self.cap), entry.used, entry.first, entry.listed,
            OrderedDict(entry.points), calls=entry.calls, usd=entry.usd,
        )  # fmt: skip
        home.account.restart(entry.held)
        while len(self._known) >= self._most:
            self._forget(next(iter(self._known.values())), "evicted")
        self._known[home.key] = home
        self._owners[home.key[0]] += 1
        self._counts["restored"] += 1
        if home.listed:
            self._requests.update(dict.fromkeys([home.first, *home.points], home))

    def _unlist(self, home: _Conversation, request: bytes) -> None:
        """The first request stays: whoever continues it pays from the same budget, however long ago."""
        if request != home.first and self._requests.get(request) is home:
            del self._requests[request]

    def _forget(self, home: _Conversation, why: str) -> None:
        del self._known[home.key]
        self._owners[home.key[0]] -= 1
        if not self._owners[home.key[0]]:
            del self._owners[home.key[0]]
        for request in {home.first, *home.points}:
            if self._requests.get(request) is home:
                del self._requests[request]
        if self._kept is not None:
            self._kept.forget(home.key)
        self._counts.update({why: 1, "abandoned": int(home.open > 0)})

    def _session(self, home: _Conversation, state: StepState, told: Digest) -> tuple[StepSession, bool]:
        restarted = len(state.steps) >= self.router.settings.step_limit
        session = self.router.session(
            told.task,
            self.cap,
            unit=self.unit,
            seed=home.name,
            state=StepState() if restarted else state,
            account=home.account,
        )
        return session, restarted

    def _sticky(self, session: StepSession, usd: Mapping[str, float]) -> _Sticky | None:
        if self._worth is None or not (steps := session.steps):
            return None
        return _Sticky(steps[-1].executor, usd, self._worth)


class _Sticky:
    """`session.Prefer`: whoever answered last stays, unless a switch brings more than it costs."""

    def __init__(self, last: str, usd: Mapping[str, float], worth: float) -> None:
        self._last, self._usd, self._worth = last, usd, worth
        self.kept = False

    def __call__(self, scores: Mapping[str, float], chosen: str) -> str:
        last = self._last
        if chosen == last or last not in scores:
            return chosen
        self.kept = self._worth * (scores[chosen] - scores[last]) <= self._usd[chosen] - self._usd[last]
        return last if self.kept else chosen


def _open(call: Call) -> tuple[StepSession, _Conversation]:
    if call.member is None or call._session is None or call._home is None:
        raise RuntimeError("this decision has no member: there is nothing to settle")
    return call._session, call._home
