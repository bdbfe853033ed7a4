"""The sampling parameters that a request's body asks for."""

from __future__ import annotations

from typing import Any

from radixkv.config import SamplingParams
from radixkv.errors import InvalidSamplingParamsError
from radixkv.serving.bodies import GenerationBody
from radixkv.serving.errors import bad_request

_SAME = (
    "n",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "speculate",
)


def sampling_params(
    body: GenerationBody, *, max_tokens: int, max_tokens_field: str = "max_tokens", **others: Any
) -> SamplingParams:
    """The parameters of `body`; OpenAI's defaults where it says nothing.

    Args:
        max_tokens_field: what the request calls `max_tokens`.
        others: fields of `SamplingParams` that the body does not have under their names.

    Raises: ApiError, which names the field as the request does.
    """
    fields: dict[str, Any] = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if fields.get("top_k") in (0, -1):  # others' ways to say that all tokens are meant
        del fields["top_k"]
    if body.logit_bias:
        fields["logit_bias"] = _bias(body.logit_bias)
    if body.prompt_cache_options is not None and body.prompt_cache_options.prewarm:
        max_tokens = 0
    temperature = 1.0 if body.temperature is None else body.temperature
    try:
        return SamplingParams(max_tokens=max_tokens, temperature=temperature, **others, **fields)
    except InvalidSamplingParamsError as error:
        name = str(error).partition(" ")[0]
        param = max_tokens_field if name == "max_tokens" else name
        raise bad_request(str(error).replace(name, param, 1), param) from error


def _bias(given: dict[str, float]) -> dict[int, float]:
    """The bias of each token. Raises: ApiError if a key is no token id."""
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise bad_request(f"logit_bias must have token ids for keys, not {key[:40]!r}", "logit_bias")
    return {int(key): value for key, value in given.items()}
