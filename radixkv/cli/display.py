"""How texts and figures look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from radixkv.engine.outputs import RequestOutput


def cut_off(outputs: Sequence[RequestOutput], max_tokens: int) -> str:
    """What to add to a summary if outputs ended before they were at their own end; empty if none did so early."""
    cut = [output for output in outputs if output.finish_reason == "length" and len(output.token_ids) < max_tokens]
    if not cut:
        return ""
    limit = max(output.prompt_tokens + len(output.token_ids) for output in cut)
    return f" · {len(cut)} cut off" * (len(outputs) > 1) + f" · the context ends at {limit:,} tokens"


def note(text: str) -> None:
    """A dim line on stderr: about the work, never the work itself."""
    typer.secho(text, dim=True, err=True)


def excerpt(text: str, num_chars: int = 60) -> str:
    """`text` on one line: shortened in the middle to `num_chars` characters, with its escapes visible.

    >>> excerpt("To be,\\nor not to be", 9)
    'To b…o be'
    >>> excerpt("a\\tb\\\\\\n")
    'a\\\\tb\\\\\\\\\\\\n'
    """
    if len(text) > num_chars:
        tail = (num_chars - 1) // 2
        return f"{_visible(text[: num_chars - 1 - tail])}…{_visible(text[len(text) - tail :])}"
    return _visible(text)


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text)


def excerpt_ids(token_ids: Sequence[int], num_ids: int = 12) -> str:
    """Token ids on one line, shortened in the middle.

    >>> excerpt_ids([7, 8, 9]), excerpt_ids(range(100), 5)
    ('7 8 9', '0 1 … 98 99')
    """
    half = num_ids // 2
    shown = token_ids if len(token_ids) <= num_ids else [*token_ids[:half], "…", *token_ids[len(token_ids) - half :]]
    return " ".join(map(str, shown))


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str | None:
    """The text of `token_ids` as it stands, special tokens included; None if there is no tokenizer."""
    return None if tokenizer is None else str(tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))


def percent(share: float) -> str:
    """A share of 1, in percent.

    >>> percent(0.125), percent(0.0)
    ('12.5 %', '0.0 %')
    """
    return f"{100 * share:.1f} %"


def seconds(duration_s: float) -> str:
    """A duration in the unit that reads best.

    >>> seconds(0.0123), seconds(2.345)
    ('12 ms', '2.35 s')
    """
    return f"{1000 * duration_s:.0f} ms" if duration_s < 1 else f"{duration_s:.2f} s"


def summary(outputs: Sequence[RequestOutput], total_s: float) -> str:
    """What `outputs`, which took `total_s` together, cost: one line. TTFT is the median of several."""
    prompt_tokens = sum(output.prompt_tokens for output in outputs)
    cached_tokens = sum(output.cached_tokens for output in outputs)
    new_tokens = sum(len(output.token_ids) for output in outputs)
    prompts = f"{len(outputs)} prompts · " if len(outputs) > 1 else ""
    ttft_s = median(output.metrics.ttft_s for output in outputs)
    return (
        f"{prompts}{prompt_tokens:,} prompt tokens, {cached_tokens:,} cached ({percent(cached_tokens / prompt_tokens)})"
        f" · {new_tokens:,} new, {new_tokens / total_s:,.1f} tokens/s · TTFT {seconds(ttft_s)}"
    )
