"""`CRF`: the tagger's CRF under the signature of the package pytorch-crf (`from torchcrf import CRF`)."""

from __future__ import annotations

import torch

from .linear_chain import LinearChainCRF


class CRF(LinearChainCRF):
    """`LinearChainCRF` with pytorch-crf's constructor, parameters, `forward` and `decode`; a change of import is the
    whole migration, and checkpoints load as they are.

    Args:
        num_tags: K.
        batch_first: False, as there: `emissions (T, B, K)`, `tags` and `mask` `(T, B)`.
        constraints: `allowed_transitions`, `allowed_start`, `allowed_end`, `impl`: see :class:`LinearChainCRF`.

    Beyond the package: a mask may begin anywhere, forbidden moves are exact, and every method of
    :class:`LinearChainCRF` is there (`marginals`, `kbest`, `sample`, `nll`, …).
    """

    def __init__(self, num_tags: int, batch_first: bool = False, **constraints) -> None:
        super().__init__(num_tags, batch_first=batch_first, **constraints)

    def forward(  # type: ignore[override]  # the package's order of arguments and its sign
        self, emissions: torch.Tensor, tags: torch.Tensor, mask: torch.Tensor | None = None, reduction: str = "sum"
    ) -> torch.Tensor:
        """The log-likelihood of `tags`; `reduction` is ``"sum"``, ``"mean"``, ``"token_mean"`` or ``"none"``."""
        return -self.nll(emissions, tags, mask=mask, reduction=reduction)

    def decode(self, emissions: torch.Tensor, mask: torch.Tensor | None = None) -> list[list[int]]:
        """The best path of every item, as long as the item."""
        with torch.no_grad():
            tags = self._items_first(self.viterbi(emissions, mask=mask).tags)
        return [[tag for tag in path if tag >= 0] for path in tags.tolist()]
