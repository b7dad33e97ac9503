"""Which columns of a forward pass are new while `model.generate` of transformers runs, and whose tokens they were.

The experts that are read from the passes of one generation belong to tokens by their column. A pass with a
KV cache brings new columns only; one without it (`use_cache: false`, in whatever configuration) brings the whole
sequence again; beam search, assisted decoding and guidance move rows, take columns back or slip passes of their own in
between. So nothing is assumed: every pass says what it was fed, and must continue the one before it.
"""

import torch
from torch import Tensor

_ASK = "sample with num_beams=1, unassisted and without guidance"


class FedTokens:
    """What the forward passes of one `generate` were fed, column by column.

    Attributes:
        columns: fed so far.
        new: how many of the last pass's columns no pass before it had seen; they are its last ones.
    """

    def __init__(self) -> None:
        self.columns = 0
        self.new = 0
        self._rows = 0
        self._ids: list[Tensor] | None = []  # [B, new columns] each; None once a pass was fed embeddings

    def feed(self, tokens: Tensor, cached: bool) -> None:
        """Take note of a pass over `tokens`, ids [B, S] or embeddings [B, S, D]; `cached`: it continues a KV cache.

        Raises:
            RuntimeError: the pass does not continue those before it.
        """
        rows, width = tokens.shape[:2]
        if self.columns and rows != self._rows:
            raise RuntimeError(
                f"the batch shrank or grew from {self._rows} sequences to {rows}: use record_rows() for a loop that "
                "does so"
            )
        known = 0 if cached else self.columns  # without a cache the whole sequence comes once more
        if tokens.dim() > 2:
            self._ids = None
        if width < known or (known and self._ids and not torch.equal(tokens[:, :known], torch.cat(self._ids, dim=1))):
            raise RuntimeError(f"a forward pass of the rollout does not continue the one before it: {_ASK}")
        self._rows, self.new = rows, width - known
        self.columns += self.new
        if self._ids is not None:
            self._ids.append(tokens[:, known:].detach().clone())
