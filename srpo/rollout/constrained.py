"""Text that is free but for what stands in a tag: there, one of a few alternatives, and nothing else, can be written.

    names = OneOf(tokenizer, "<route>", ["small", "large"], ["</route>"])
    names.state(ids)     # where a text stands after these, the sampler's automaton; `.allowed`: ids that may follow
    names(ids)           # the same for each position of a finished completion: the mask of its log-probs

A pure function of the completion's ids, in two parts. Outside the tag the *text* decides, since the opening may be
written in many ways. Where its last token could go on with other text (`>` with a line break), the opening must be
ended properly: so whoever has written `<route` goes on with `>`, and positions are either free or have a few choices.
Inside, an alternative has one spelling: the ids by which the tokenizer itself writes it there. So alternatives that
begin alike share their first ids, the probability of one is a product of a few renormalised steps, and those of all
sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Union

from srpo.rollout.turns import Request, Sample, State
from srpo.texts import reader

Node = dict[int, Union["Node", str]]
"""Ids that may follow, each with what follows it; at the end the alternative."""


class _State(State):
    """`tail`: outside the tag, the end of the text, where it may be the beginning of the opening; `node`: inside."""

    next: dict[int, _State]

    def __init__(self, allowed: tuple[int, ...] | None, tail: str, node: Node | None, step: _Step) -> None:
        super().__init__(allowed, _Next(partial(step, self)))
        self.tail, self.node = tail, node


class _Next(dict[int, _State]):
    """Where each token leads, found out when it comes for the first time."""

    def __init__(self, step: Callable[[int], _State]) -> None:
        self._step = step

    def __missing__(self, i: int) -> _State:
        self[i] = state = self._step(i)
        return state


_Step = Callable[[_State, int], _State]


class OneOf:
    """Which ids may follow, so that a tag holds one of `alternatives`.

    Args:
        tokenizer: of the policy.
        opening: text that begins the tag.
        alternatives: what may stand after it, all different.
        closings: texts of which one must follow an alternative; then the text is free again.

    Raises:
        ValueError: nothing to choose from; one alternative with its closing begins another; or the tokenizer cannot
            write one.
    """

    def __init__(
        self, tokenizer: Any, opening: str, alternatives: Sequence[str], closings: Sequence[str] = ("",)
    ) -> None:
        self._tokenizer, self._text = tokenizer, reader(tokenizer)
        self._opening, self.alternatives = opening, tuple(alternatives)
        self._wholes = {alternative + closing: alternative for alternative in alternatives for closing in closings}
        ordered = sorted(self._wholes)
        if not ordered or not opening or "" in ordered or len(ordered) < len(alternatives) * len(closings):
            raise ValueError(f"{list(alternatives)} after {opening!r}: give different texts that are not empty")
        for one, other in pairwise(ordered):
            if other.startswith(one):
                raise ValueError(f"{one!r} begins {other!r}: nothing tells where the first one ends")
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._anchor, self._anchored = anchor, len(self._text(anchor))
        self._pieces: dict[int, str] = {}
        self._tries: dict[str, Node] = {}
        self._states: dict[str | int, _State] = {}
        # A token's name shows printable characters as they are, or is that of a byte (<0x7B>).
        vocabulary = sorted(tokenizer.get_vocab().items())
        self._vocabulary = [(token, i) for token, i in vocabulary if {*token} & {*opening}]
        if odd := [token for token, _ in self._vocabulary if opening in token and not token.endswith(opening)]:
            raise ValueError(f"the tokenizer has a token {odd[0]!r}, which goes on after {opening!r}")
        self._trie("")
        self._start = self._at("")
        if (
            opening[0].isascii() and opening[0].isprintable() and not opening[0].isspace()
        ):  # most tokens begin no opening
            idle = [i for token, i in vocabulary if opening[0] not in token and not token.startswith("<0x")]
            self._start.next |= dict.fromkeys(idle, self._start)

    def __call__(self, ids: Sequence[int]) -> list[Sequence[int] | None]:
        """For each position, the ids that were allowed there; None: any."""
        found: list[Sequence[int] | None] = []
        state = self._start
        for i in ids:
            found.append(state.allowed)
            state = state.next[i]
        return found

    def state(self, ids: Sequence[int] = ()) -> State:
        """Where a completion stands after `ids`."""
        state = self._start
        for i in ids:
            state = state.next[i]
        return state

    def after(self, ids: Sequence[int]) -> Sequence[int] | None:
        """The ids that may follow `ids`; None: any."""
        return self.state(ids).allowed

    def inside(self, ids: Sequence[int]) -> tuple[int, Node] | None:
        """(length, tree) of the first prefix of `ids` after which an alternative begins; None: there is none."""
        state = self._start
        for n, i in enumerate(ids, start=1):
            state = state.next[i]
            if state.node is not None:
                return n, state.node
        return None

    def spelling(self, tree: Node, alternative: str) -> list[int]:
        """The shortest way through a tree to an alternative."""
        paths: list[tuple[int, ...]] = [path for path, found in _leaves(tree) if found == alternative]
        shortest = min(paths, key=len)
        return list(shortest)

    def targets(self, ids: Sequence[int], probabilities: Mapping[str, float]) -> list[tuple[int, int, float]]:
        """Where `ids` choose an alternative: (position, id, probability) of each id that could follow there, if the
        alternatives had these probabilities. Along a path that is drawn from them, the cross-entropies to these sum up
        to that of the alternatives in expectation; where each is one token, exactly."""
        found: list[tuple[int, int, float]] = []
        begun = self.inside(ids)
        place, node = begun or (0, "")
        while isinstance(node, dict):
            below = {i: sum(probabilities[name] for name in _names(child)) for i, child in node.items()}
            if len(node) > 1:
                found += [(place, i, mass / sum(below.values())) for i, mass in below.items()]
            node, place = node[ids[place]], place + 1
        return found

    def _at(self, tail: str = "", node: Node | None = None) -> _State:
        key = tail if node is None else id(node)
        if key not in self._states:
            allowed = self._endings(tail) if node is None else tuple(node)
            self._states[key] = _State(allowed, tail, node, self._step)
        return self._states[key]

    def _step(self, state: _State, i: int) -> _State:
        if state.node is not None and i in state.node:
            below = state.node[i]
            return self._at() if isinstance(below, str) else self._at(node=below)
        text = ("" if state.node is not None else state.tail) + self._piece(i)
        at = text.find(self._opening)
        if at >= 0 and (node := self._trie(text[at + len(self._opening) :])):
            return self._at(node=node)
        text = text[-len(self._opening) + 1 :] if len(self._opening) > 1 else ""
        return self._at(next((text[n:] for n in range(len(text)) if self._opening.startswith(text[n:])), ""))

    def _endings(self, tail: str) -> tuple[int, ...] | None:
        """After the text `tail`, the ids that go on with the opening; None: none could end it badly, so any may."""
        rest = self._opening[len(tail) :]
        if all(self._ends_well(self._piece(i), rest) for token, i in self._vocabulary if rest[-1] in token):
            return None
        few = [(self._piece(i), i) for token, i in self._vocabulary if rest[0] in token]
        return tuple(i for piece, i in few if (piece and rest.startswith(piece)) or self._goes_on(piece, rest))

    def _ends_well(self, piece: str, rest: str) -> bool:
        return not piece.startswith(rest) or piece == rest or self._goes_on(piece, rest)

    def _goes_on(self, piece: str, rest: str) -> bool:
        return piece.startswith(rest) and bool(self._trie(piece[len(rest) :]))

    def _trie(self, begun: str) -> Node:
        """What may follow where the token that ended the opening wrote `begun` of an alternative too; {}: nothing."""
        if begun not in self._tries:
            root: Node = {}
            for whole, alternative in self._wholes.items():
                if whole.startswith(begun) and whole != begun:
                    *path, last = self._spelling(whole, len(begun))
                    node = root
                    for i in path:
                        node = node.setdefault(i, {})  # type: ignore[assignment]
                    node[last] = alternative
            self._tries[begun] = root
        return self._tries[begun]

    def _spelling(self, whole: str, begun: int) -> list[int]:
        """Ids that write `whole[begun:]`, cut out of the tokenizer's own spelling where that has a seam there."""
        rest = whole[begun:]
        for before in (self._opening + whole[:begun], "a"):
            ids, n = self._tokenizer(before + rest, add_special_tokens=False)["input_ids"], 0
            while ids and n < len(ids) and len(self._text(ids[:n])) < len(before):
                n += 1
            if "".join(map(self._piece, ids[n:])) == rest:
                return list(ids[n:])
        raise ValueError(f"the tokenizer cannot write {rest!r} after {self._opening!r}")

    def _piece(self, i: int) -> str:
        """What a token adds to a text: by itself, many tokenizers drop its leading space."""
        if i not in self._pieces:
            self._pieces[i] = self._text([*self._anchor, i])[self._anchored :]
        return self._pieces[i]


def choice_probabilities(
    ask: Callable[[Sequence[Request]], list[Sample]], choices: Sequence[tuple[Node, Sequence[int], int]]
) -> list[dict[str, float]]:
    """Probability of each alternative, when the policy chooses under the mask; those of a choice sum to 1.

    Args:
        ask: a generator's `generate`: told the choices of a fork, it says the log-probability of each. Asked once.
        choices: of each (tree of `OneOf.inside`; ids of the prompt and of the turn up to there; whose cache is
            continued).
    """
    forks = [(n, path, node) for n, (tree, _, _) in enumerate(choices) for path, node in _forks(tree)]
    requests = [Request(choices[n][2], (*choices[n][1], *path), "", 1, tuple(node)) for n, path, node in forks]
    scores: list[dict[tuple[int, ...], dict[int, float]]] = [{} for _ in choices]
    for (n, path, node), sample in zip(forks, ask(requests), strict=True):
        scores[n][path] = dict(zip(node, sample.scores, strict=True))
    return [_products(tree, known) for (tree, _, _), known in zip(choices, scores, strict=True)]


def _forks(node: Node, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Node]]:
    if len(node) > 1:
        yield path, node
    for i, below in node.items():
        if not isinstance(below, str):
            yield from _forks(below, (*path, i))


def _leaves(node: Node, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    for i, below in node.items():
        yield from [((*path, i), below)] if isinstance(below, str) else _leaves(below, (*path, i))


def _names(node: Node | str) -> set[str]:
    return {node} if isinstance(node, str) else {name for _, name in _leaves(node)}


def _products(tree: Node, steps: Mapping[tuple[int, ...], Mapping[int, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for path, alternative in _leaves(tree):
        logp = sum(steps[path[:n]][i] for n, i in enumerate(path) if path[:n] in steps)
        found[alternative] = found.get(alternative, 0.0) + math.exp(logp)
    total = sum(found.values())  # 1, but for rounding
    return {alternative: p / total for alternative, p in found.items()}
