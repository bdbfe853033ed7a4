"""Clients that go through sessions, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx2 as httpx

from radixkv_bench.cluster.sessions import CLIENTS, Turn

ENDLESS_S = 600.0


class Answered(NamedTuple):
    """What became of a request; `trouble` is why it was lost, if it was."""

    turn: Turn
    text: str
    cached_tokens: int
    replica: str = ""
    trouble: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it is what the model alone answers."""
        return not self.trouble and self.text == self.turn.answer


async def go_through(
    turns: Sequence[Sequence[Turn]], ask: HttpAsker, *, at: dict[int, Callable[[], object]] | None = None
) -> list[Answered]:
    """All requests, `CLIENTS` at once, in the order of turns.

    Args: at: what to do when as many requests have been answered, while others run.
    """
    room = asyncio.Semaphore(CLIENTS)
    due = dict(at or {})
    answered: list[Answered] = []

    async def one(turn: Turn) -> None:
        async with room:
            found = await ask.ask(turn)
        answered.append(found)
        if (act := due.pop(len(answered), None)) is not None:
            await asyncio.to_thread(act)

    for of_turn in turns:  # a session's next prompt has its last answer in it
        await asyncio.gather(*[one(turn) for turn in of_turn])
    return answered


class HttpAsker:
    """Asks over HTTP: every second request as a stream that is to go on if its replica is lost."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def ask(self, turn: Turn) -> Answered:
        """What becomes of a request."""
        body = {
            "prompt": turn.prompt_ids,
            "max_tokens": len(turn.answer_ids),
            "temperature": 0,
            "ignore_eos": True,
        }
        try:
            if (turn.session + turn.number) % 2:
                return await self._streamed(turn, body)
            answer = await self._client.post("/v1/completions", json=body)
            if answer.status_code != 200:
                return Answered(turn, "", 0, trouble=f"status {answer.status_code}: {answer.text[:200]}")
            return _answered(turn, answer.json()["choices"][0]["text"], answer.json()["usage"], answer.headers)
        except httpx.HTTPError as error:
            return Answered(turn, "", 0, trouble=f"{type(error).__name__}: {error}")

    async def _streamed(self, turn: Turn, body: dict[str, Any]) -> Answered:
        more = {"stream": True, "stream_options": {"include_usage": True}, "radixkv_continue": True}
        text, usage = "", None
        async with self._client.stream("POST", "/v1/completions", json=body | more) as answer:
            if answer.status_code != 200:
                return Answered(turn, "", 0, trouble=f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line[6:])
                if "error" in data:
                    return Answered(turn, text, 0, trouble=data["error"]["message"])
                usage = data.get("usage") or usage
                text += "".join(choice["text"] for choice in data["choices"])
        if usage is None:
            return Answered(turn, text, 0, trouble="the stream ended early")
        return _answered(turn, text, usage, answer.headers)


def _answered(turn: Turn, text: str, usage: dict[str, Any], headers: Mapping[str, str]) -> Answered:
    return Answered(turn, text, usage["prompt_tokens_details"]["cached_tokens"], headers["x-radixkv-replica"])


def over_http(address: str, turns: Sequence[Sequence[Turn]], at: dict[int, Callable[[], object]]) -> list[Answered]:
    """All requests, asked at an address."""

    async def main() -> list[Answered]:
        async with httpx.AsyncClient(base_url=address, timeout=ENDLESS_S, trust_env=False) as client:
            return await go_through(turns, HttpAsker(client), at=at)

    return asyncio.run(main())


def hit_rate(answered: Sequence[Answered]) -> float:
    """Cached tokens of all prompt tokens."""
    return sum(one.cached_tokens for one in answered) / max(1, sum(len(one.turn.prompt_ids) for one in answered))
