"""How a prompt is continued: the parameters of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from radixkv.config.setting import Setting, check_settings, described
from radixkv.errors import InvalidSamplingParamsError

MAX_LOGPROBS = 100
MAX_SEED = 2**63 - 1


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Checked when made; an error names the field."""

    max_tokens: Annotated[
        int,
        Setting(
            "New tokens at most. Generation also ends at the context's or the pool's limit.", unit="tokens", minimum=1
        ),
    ] = 128
    temperature: Annotated[
        float, Setting("0 takes the likeliest token (greedy); above 0, logits are divided by it.", minimum=0)
    ] = 0.0
    top_p: Annotated[
        float,
        Setting(
            "Draw from the likeliest tokens that together reach this probability (nucleus sampling, Holtzman et al. "
            "2020).",
            above=0,
            maximum=1,
        ),
    ] = 1.0
    top_k: Annotated[
        int | None, Setting("Draw from this number of the likeliest tokens.", unit="tokens", minimum=1, unset="all")
    ] = None
    min_p: Annotated[
        float,
        Setting(
            "Draw from tokens at least this probable relative to the likeliest (Nguyen et al. 2024).",
            minimum=0,
            maximum=1,
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        Setting(
            "Makes sampling repeatable, whatever else runs in the batch.",
            minimum=0,
            maximum=MAX_SEED,
            unset="another for each request",
        ),
    ] = None
    stop: Annotated[
        str | Sequence[str], Setting("Texts that end the output. The output does not contain the one that ended it.")
    ] = ()
    stop_token_ids: Annotated[
        Sequence[int], Setting("Ids that end the output, as the model's own end-of-sequence ids do.", minimum=0)
    ] = ()
    ignore_eos: Annotated[bool, Setting("Go on after end-of-sequence ids.")] = False
    logprobs: Annotated[
        int | None,
        Setting(
            "Report the log probability of each output token, and of this number of the likeliest alternatives.",
            unit="tokens",
            minimum=0,
            maximum=MAX_LOGPROBS,
            unset="no report",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_settings(self, InvalidSamplingParamsError)

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1
