"""The sampling parameters that a request's body asks for."""

from __future__ import annotations

from typing import Any

from radixkv.config import SamplingParams
from radixkv.errors import InvalidSamplingParamsError
from radixkv.serving.bodies import GenerationBody
from radixkv.serving.errors import bad_request

_SAME = ("top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos")


def sampling_params(
    body: GenerationBody, *, max_tokens: int, max_tokens_field: str = "max_tokens", logprobs: int | None = None
) -> SamplingParams:
    """The parameters of `body`; OpenAI's defaults where it says nothing.

    Raises: ApiError, which names the field as the request does.
    """
    fields: dict[str, Any] = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if fields.get("top_k") in (0, -1):  # others' ways to say that all tokens are meant
        del fields["top_k"]
    temperature = 1.0 if body.temperature is None else body.temperature
    try:
        return SamplingParams(max_tokens=max_tokens, temperature=temperature, logprobs=logprobs, **fields)
    except InvalidSamplingParamsError as error:
        name = str(error).partition(" ")[0]
        param = max_tokens_field if name == "max_tokens" else name
        raise bad_request(str(error).replace(name, param, 1), param) from error
