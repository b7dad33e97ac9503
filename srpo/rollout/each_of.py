"""Groups that hold each alternative of a choice: all that the policy could have chosen, in place of draws.

    row n of a batch:   what was written before choice n // M   +   alternative n % M   +   what was written after it

The text before is sampled once for M rows, and the policy's probability of each alternative after it is known. So
every alternative is tried, also those that the policy would hardly ever draw, and the credit of
`srpo.objectives.advantages.importance_weighted` is exact where draws would estimate it. The text itself is drawn: a
group holds two or more, or nothing would speak against one that never comes to the choice.
"""

from collections.abc import Sequence
from dataclasses import replace

from srpo.rollout.constrained import Node, OneOf, choice_probabilities
from srpo.rollout.generator import Generator, Request, Sample


class EachOf(OneOf):
    """`OneOf`, of which training samples each alternative; a group is a multiple of `len(alternatives)`."""

    def completions(
        self, generator: Generator, requests: Sequence[Request], first: int
    ) -> tuple[list[Sample], list[float]]:
        """A completion for each request, without log-probs, and its importance: M x the policy's probability of its
        alternative. A text that never comes to the choice is every one of its M rows, with importance 1.

        Args:
            requests: of consecutive rows; those of a choice are alike but for `row`. The seed of its first one counts.
            first: number of the first row among those of all processes.
        """
        m = len(self.alternatives)
        numbers = range(first, first + len(requests))
        asked: dict[int, Request] = {}
        for n, request in zip(numbers, requests, strict=True):
            asked.setdefault(n // m, request)
        written = dict(zip(asked, generator.generate(list(asked.values())), strict=True))
        begun = {choice: found for choice, sample in written.items() if (found := self.inside(sample.ids))}
        choices = [
            (tree, (*asked[choice].ids, *written[choice].ids[:length]), asked[choice].row)
            for choice, (length, tree) in begun.items()
        ]
        chances = dict(zip(begun, choice_probabilities(generator.generate, choices), strict=True))
        samples, known = [], []
        for n, request in zip(numbers, requests, strict=True):
            sample = written[n // m]
            if n // m in begun:
                length, tree = begun[n // m]
                name = self.alternatives[n % m]
                path = (*sample.ids[:length], *self.spelling(tree, name), *_after(tree, sample.ids[length:]))
                known.append(m * chances[n // m][name])
                sample = replace(sample, ids=path[: request.max_tokens], logprobs=())
            else:
                known.append(1.0)
            samples.append(sample)
        return samples, known


def _after(tree: Node, ids: Sequence[int]) -> Sequence[int]:
    """What follows the alternative that `ids` begin with."""
    node: Node | str = tree
    for n, i in enumerate(ids, start=1):
        assert isinstance(node, dict)
        node = node[i]
        if isinstance(node, str):
            return ids[n:]
    return ()
