"""How a prompt is continued: the parameters of one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from radixkv.config.setting import Setting, check_settings, described
from radixkv.errors import InvalidSamplingParamsError

MAX_LOGPROBS = 100
MAX_SEED = 2**63 - 1
MAX_CHOICES = 128
MAX_LOGIT_BIAS = 100


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. Checked when made; an error names the field."""

    max_tokens: Annotated[
        int,
        Setting(
            "New tokens at most. Generation also ends at the context's or the pool's limit. 0 computes the prompt "
            "alone, so that later requests find it cached.",
            unit="tokens",
            minimum=0,
        ),
    ] = 128
    min_tokens: Annotated[
        int,
        Setting(
            "New tokens before one that ends the output: until then no stop id and no `stop` text ends it.",
            unit="tokens",
            minimum=0,
        ),
    ] = 0
    n: Annotated[
        int,
        Setting(
            "Choices: outputs for one prompt, which is computed once. Each draws by a seed of its own, the first by "
            "`seed`.",
            unit="choices",
            minimum=1,
            maximum=MAX_CHOICES,
        ),
    ] = 1
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
    presence_penalty: Annotated[
        float,
        Setting("Subtracted from the logit of each token that the output holds already.", minimum=-2, maximum=2),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        Setting("Subtracted from the logit of each token, times how often the output holds it.", minimum=-2, maximum=2),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Setting(
            "Divides positive logits of tokens that prompt or output hold, and multiplies negative ones (Keskar et al. "
            "2019).",
            minimum=0.01,
            maximum=100,
        ),
    ] = 1.0
    logit_bias: Annotated[
        Mapping[int, float] | None,
        Setting(
            "Added to the logits of these tokens, after the penalties.",
            minimum=-MAX_LOGIT_BIAS,
            maximum=MAX_LOGIT_BIAS,
            unset="no bias",
        ),
    ] = None
    logits_transform: Annotated[
        Callable[[], Any] | None,
        Setting(
            "Called for each output; returns a LogitsTransform, which may change the logits before a token is chosen, "
            "for instance by a grammar.",
            unset="no transform",
        ),
    ] = None
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
    speculate: Annotated[
        bool,
        Setting(
            "Whether its tokens may come several at a time: guessed and checked, where the engine does so, or forced "
            "by a logits_transform."
        ),
    ] = True
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
    prompt_logprobs: Annotated[
        int | None,
        Setting(
            "Report the same for each prompt token. The prompt is computed from its start, whatever is cached of it.",
            unit="tokens",
            minimum=0,
            maximum=MAX_LOGPROBS,
            unset="no report",
        ),
    ] = None

    def __post_init__(self) -> None:
        check_settings(self, InvalidSamplingParamsError)
        if self.min_tokens > self.max_tokens:
            raise InvalidSamplingParamsError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were there before have other logits."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1
