"""Groups that hold each alternative of a choice: all that the policy could have chosen, in place of draws.

    a group of G rows:   k = G // M beginnings, each followed by each of M alternatives, and by what was written after;
                         G - k M rows are there twice
    w(row) = G pi(alternative | beginning) / (k n)      n times that the group holds it

The beginning, a thought, is sampled once, and the policy's probability of each alternative after it is known. So every
alternative is tried, also those that the policy would hardly ever draw, and the credit of
`srpo.objectives.advantages.importance_weighted` is exact where draws would estimate it. Beginnings are drawn: a group
holds two or more, or nothing would speak against one that never comes to the choice.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from srpo.rollout.constrained import Node, OneOf, choice_probabilities
from srpo.rollout.turns import Generator, Request, Sample


class EachOf(OneOf):
    """`OneOf`, of which training samples each alternative."""

    def place(self, row: int, size: int) -> tuple[int, int, int]:
        """(group, beginning, alternative) of the `row`-th of all rows, in groups of `size`."""
        m = len(self.alternatives)
        group, n = divmod(row, size)
        k = size // m
        return group, n // m if n < k * m else (n - k * m) % k, n % m

    def completions(
        self, generator: Generator, requests: Sequence[Request], first: int, size: int
    ) -> tuple[list[Sample], list[float]]:
        """A completion for each request, without log-probs, and its importance w. A text that never comes to the
        choice is every one of its rows.

        Args:
            requests: of consecutive rows; those that share a beginning have the same seed.
            first: number of the first row among those of all processes.
            size: of a group, G.
        """
        m = len(self.alternatives)
        k = size // m
        places = [self.place(first + n, size) for n in range(len(requests))]
        times = Counter(self.place(n, size)[1:] for n in range(size))
        asked: dict[tuple[int, int], Request] = {}
        for (group, beginning, _), request in zip(places, requests, strict=True):
            asked.setdefault((group, beginning), request)
        written = dict(zip(asked, generator.generate(list(asked.values())), strict=True))
        begun = {key: found for key, sample in written.items() if (found := self.inside(sample.ids))}
        choices = [
            (tree, (*asked[key].ids, *written[key].ids[:length]), asked[key].row)
            for key, (length, tree) in begun.items()
        ]
        chances = dict(zip(begun, choice_probabilities(generator.generate, choices), strict=True))
        samples, importance = [], []
        for (group, beginning, alternative), request in zip(places, requests, strict=True):
            key = (group, beginning)
            sample, name = written[key], self.alternatives[alternative]
            weight = size / (k * sum(n for (of, _), n in times.items() if of == beginning))
            if key in begun:
                length, tree = begun[key]
                path = (*sample.ids[:length], *self.spelling(tree, name), *_after(tree, sample.ids[length:]))
                sample = replace(sample, ids=path[: request.max_tokens], logprobs=())
                weight = size * chances[key][name] / (k * times[beginning, alternative])
            samples.append(sample)
            importance.append(weight)
        return samples, importance


def _after(tree: Node, ids: Sequence[int]) -> Sequence[int]:
    """What follows the alternative that `ids` begin with."""
    node: Node | str = tree
    for n, i in enumerate(ids, start=1):
        assert isinstance(node, dict)
        node = node[i]
        if isinstance(node, str):
            return ids[n:]
    return ()
