"""How the next token is chosen: the filters that `SamplingParams` describe, and the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from radixkv.config import SamplingParams as SamplingParams  # many import it from here


class TokenLogprobs(NamedTuple):
    """Log probabilities at one output token, of the model's own distribution (before temperature and filters).

    `top` holds the likeliest (id, log probability), best first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Chooses tokens. Each request that samples draws from a generator of its own, so batching changes nothing."""

    def likeliest(self, logits: Tensor) -> tuple[list[int], list[bool]]:
        """The likeliest token of each row of `logits` [rows, vocab_size], and whether the row can be sampled from.

        It cannot if it holds NaN or plus infinity, or nothing above minus infinity; its token means nothing then.
        """
        best = logits.max(dim=-1)
        return best.indices.tolist(), list(map(math.isfinite, best.values.tolist()))

    def draw(self, logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
        """A token drawn from one row [vocab_size]."""
        ids, probabilities = filtered_probabilities(logits, params)
        return int(ids[torch.multinomial(probabilities.cpu(), 1, generator=generator)[0]])

    def pass_over(self, vocab_size: int, params: SamplingParams, generator: torch.Generator) -> None:
        """Take as much from `generator` as `draw` does where a single one of `vocab_size` tokens can come.

        So what is drawn later does not depend on whether that token was drawn. O(1) with `top_p` or `min_p`, else
        O(tokens that `top_k` keeps).
        """
        is_cut = params.top_p < 1 or params.min_p > 0
        kept = 1 if is_cut else min(params.top_k or vocab_size, vocab_size)
        torch.multinomial(torch.ones(kept, dtype=torch.float64, device="cpu"), 1, generator=generator)

    def logprobs(self, logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
        """Log probabilities of one row [vocab_size] of logits."""
        (entry,) = self.logprobs_of_rows(logits[None], [token_id], num_top)
        return entry

    def logprobs_of_rows(self, logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """Log probabilities of each row of `logits` [rows, vocab_size], and of its token in `token_ids`."""
        values = torch.log_softmax(logits.float(), dim=-1)
        own = values.gather(1, torch.tensor(token_ids, dtype=torch.int64, device=values.device)[:, None])[:, 0]
        top = values.topk(min(num_top, values.shape[1]))
        rows = zip(token_ids, own.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
        return [
            TokenLogprobs(token_id, logprob, list(zip(ids, best, strict=True))) for token_id, logprob, ids, best in rows
        ]


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What may be drawn from one row [vocab_size]: (token ids, probabilities), likeliest first.

    Temperature first, then top_k, top_p and min_p, each on what the one before kept, renormalised.
    """
    scaled = (logits.double() - logits.max()) / params.temperature  # at most 0, so no temperature overflows
    order = scaled.sort(descending=True, stable=True)
    values, ids = order.values, order.indices
    if params.top_k is not None:
        values, ids = values[: params.top_k], ids[: params.top_k]
    probabilities = torch.softmax(values, dim=-1)
    if params.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        num_kept = max(1, int((before < params.top_p).sum()))
        ids, probabilities = ids[:num_kept], probabilities[:num_kept]
    if params.min_p > 0:
        num_kept = int((probabilities >= params.min_p * probabilities[0]).sum())
        ids, probabilities = ids[:num_kept], probabilities[:num_kept]
    return ids, probabilities / probabilities.sum()
