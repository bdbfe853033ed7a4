"""Pages as tensors: what every kind of pool can do with a page once it shows where the page's bytes lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor


class PagePool(ABC):
    """Pages of KV that can be copied and cleared, whatever a page holds."""

    @abstractmethod
    def page_tensors(self, page: int) -> list[Tensor]:
        """Views of all that is kept of `page`: `[page_size / w, w, ...]`, with token t at `[t // w, t % w]`.

        They come in the same order for every page. Pages of equal pools have tensors of equal shapes, so that a page
        can be copied to another pool, too. O(layers).
        """

    def clear_page(self, page: int) -> None:
        """Make the KV of `page` zeros, in every layer."""
        for tensor in self.page_tensors(page):
            tensor.zero_()

    def copy_page(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the KV of the first `num_tokens` slots of page `source` to page `target`, in every layer."""
        copy_tokens(self.page_tensors(source), self.page_tensors(target), num_tokens)


def copy_tokens(source: Sequence[Tensor], target: Sequence[Tensor], num_tokens: int) -> None:
    """Copy the first `num_tokens` tokens of a page to another one; both are as `PagePool.page_tensors` gives them."""
    for old, new in zip(source, target, strict=True):
        whole, rest = divmod(num_tokens, new.shape[1])
        new[:whole].copy_(old[:whole])
        if rest:
            new[whole, :rest].copy_(old[whole, :rest])
