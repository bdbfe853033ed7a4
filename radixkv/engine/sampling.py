"""How the next token is chosen: the parameters of a request, and the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from radixkv.errors import InvalidSamplingParamsError

MAX_LOGPROBS = 100
NUMBERS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Checked when made; an error names the field.

    Attributes:
        max_tokens: new tokens at most. Generation also ends at the context's or the pool's limit.
        temperature: 0 takes the likeliest token (greedy); else logits are divided by it.
        top_p: keep the likeliest tokens that reach this probability together (nucleus sampling, Holtzman et al. 2020).
        top_k: keep that many of the likeliest tokens; None keeps all.
        min_p: keep tokens at least this probable relative to the likeliest (Nguyen et al. 2024).
        seed: makes sampling repeatable, whatever else runs in the batch; None draws one from the engine's.
        stop: strings that end the output; the text ends before them.
        stop_token_ids: ids that end the output, as the model's own end-of-sequence ids do.
        ignore_eos: go on after end-of-sequence ids.
        logprobs: report each token's log probability and that many of the likeliest alternatives.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in NUMBERS:  # numpy's numbers as Python's
            value = getattr(self, name)
            if isinstance(value, np.integer | np.floating):
                object.__setattr__(self, name, value.item())
        self._check_int("max_tokens", self.max_tokens, 1)
        self._require(isinstance(self.ignore_eos, bool), "ignore_eos", "must be True or False", self.ignore_eos)
        self._check_range("temperature", self.temperature, 0.0, math.inf)
        self._check_range("top_p", self.top_p, 0.0, 1.0)
        self._require(self.top_p > 0, "top_p", "must lie in (0, 1]", self.top_p)
        self._check_range("min_p", self.min_p, 0.0, 1.0)
        for name, minimum in (("top_k", 1), ("seed", 0), ("logprobs", 0)):
            if getattr(self, name) is not None:
                self._check_int(name, getattr(self, name), minimum)
        self._require((self.seed or 0) < 2**63, "seed", "must be below 2**63", self.seed)
        self._require(
            (self.logprobs or 0) <= MAX_LOGPROBS, "logprobs", f"must be at most {MAX_LOGPROBS}", self.logprobs
        )
        for name in ("stop", "stop_token_ids"):
            listed = isinstance(getattr(self, name), Sequence)
            self._require(listed, name, "must be a list", getattr(self, name))
        for stop in self.stops:
            self._require(isinstance(stop, str) and stop != "", "stop", "must hold strings that are not empty", stop)
        self._require(not isinstance(self.stop_token_ids, str), "stop_token_ids", "must be ids", self.stop_token_ids)
        for token_id in self.stop_token_ids:
            self._check_int("stop_token_ids", token_id, 0)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def _check_int(self, name: str, value: object, minimum: int) -> None:
        is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
        self._require(is_int and value >= minimum, name, f"must be an integer of at least {minimum}", value)  # type: ignore[operator]

    def _check_range(self, name: str, value: object, low: float, high: float) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
        self._require(is_number and low <= value <= high, name, f"must be a number in [{low:g}, {high:g}]", value)  # type: ignore[operator]

    @staticmethod
    def _require(holds: bool, name: str, what: str, value: object) -> None:
        if not holds:
            raise InvalidSamplingParamsError(f"{name} {what}, not {value!r}")


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
        return best.indices.tolist(), torch.isfinite(best.values).tolist()

    def draw(self, logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
        """A token drawn from one row [vocab_size]."""
        ids, probabilities = filtered_probabilities(logits, params)
        return int(ids[torch.multinomial(probabilities.cpu(), 1, generator=generator)[0]])

    def logprobs(self, logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
        """Log probabilities of one row [vocab_size] of logits."""
        values = torch.log_softmax(logits.float(), dim=-1)
        top = values.topk(min(num_top, len(values)))
        return TokenLogprobs(
            token_id, float(values[token_id]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        )


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
