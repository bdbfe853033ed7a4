"""Log probabilities, as OpenAI writes them for chats and for completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from radixkv.engine.sampling import TokenLogprobs

LOWEST = -9999.0  # JSON has no infinity


class TokenTexts:
    """The text of single tokens."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """What a token decodes to by itself; for part of a character, the replacement character."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        text: str = self._tokenizer.decode([token_id])
        return text


def of_chat(logprobs: Iterable[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    content = [
        {
            **_token(entry.token_id, entry.logprob, texts),
            "top_logprobs": [_token(token_id, value, texts) for token_id, value in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def of_completion(
    logprobs: Sequence[TokenLogprobs | None], texts: TokenTexts, *, first_id: int | None = None, offset: int = 0
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion.

    Args:
        logprobs: None for the first token of a prompt, which nothing precedes; `first_id` is that token.
        offset: characters before.
    """
    tokens = [texts.text(first_id if entry is None else entry.token_id) for entry in logprobs]  # type: ignore[arg-type]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else max(entry.logprob, LOWEST) for entry in logprobs],
        "top_logprobs": [
            None if entry is None else {texts.text(i): max(value, LOWEST) for i, value in entry.top}
            for entry in logprobs
        ],
        "text_offset": offsets,
    }


def _token(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text = texts.text(token_id)
    has_bytes = "\ufffd" not in text
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode()) if has_bytes else None}
