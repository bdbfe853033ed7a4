"""A small HTTP client for streams of server-sent events: it costs little, and can leave at any point."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from radixkv_bench.common.errors import BenchError

Body = Mapping[str, Any]
ANSWER_TIMEOUT_S = 60
COMPLETIONS = "/v1/completions"
CHATS = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Reply:
    """A streamed answer that came to its end.

    Attributes:
        text: of the first choice.
        sent_s, first_s, last_s: when the request was sent, the first text came, and the stream ended, on the clock of
            `time.perf_counter`.
        cached_tokens: of the prompt; None where the server does not tell.
    """

    text: str
    sent_s: float
    first_s: float
    last_s: float
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Seconds to the first text."""
        return self.first_s - self.sent_s

    @property
    def tokens_a_second(self) -> float:
        """Tokens after the first one, by the time that they took."""
        return (self.output_tokens - 1) / (self.last_s - self.first_s)


async def ask(address: Address, path: str, body: Body) -> Reply:
    """Send a request with `stream` and read its answer. Raises: BenchError if the server refuses it, or fails."""
    sent_s = time.perf_counter()
    first_s: float | None = None
    events: list[Any] = []
    later: list[bytes] = []  # read without a look inside, so that the client costs the machine little
    async with _connection(address, path, body) as reader, aclosing(_events(reader)) as stream:
        async for data in stream:
            if first_s is not None:
                later.append(data)
                continue
            events.append(parsed_event(data))
            if text_of(events[-1]):
                first_s = time.perf_counter()
    last_s = time.perf_counter()
    events += map(parsed_event, later)
    return reply_of(events, sent_s, first_s, last_s, f"{address}{path}")


def reply_of(events: Sequence[Any], sent_s: float, first_s: float | None, last_s: float, what: str) -> Reply:
    """The answer that these events make. Raises: BenchError if there is no text, or no usage."""
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    if first_s is None or usage is None:
        raise BenchError(f"{what} ended a stream without text or without usage")
    return Reply(
        text="".join(map(text_of, events)),
        sent_s=sent_s,
        first_s=first_s,
        last_s=last_s,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        output_tokens=usage["completion_tokens"],
    )


async def ask_and_leave(address: Address, path: str, body: Body, num_events: int) -> None:
    """Send a request, read so many events of its answer at most, and close the connection."""
    async with _connection(address, path, body) as reader:
        if num_events:
            async with aclosing(_events(reader)) as stream:
                async for _ in stream:
                    num_events -= 1
                    if not num_events:
                        break


def counters(address: Address) -> dict[str, float]:
    """What `/metrics` of a server counts without labels. Raises: BenchError."""
    families = _get(address, "/metrics", lambda answer: list(text_string_to_metric_families(answer.read().decode())))
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def get_json(address: Address, path: str) -> Any:
    """The answer to a GET request. Raises: BenchError."""
    return _get(address, path, json.load)


def _get(address: Address, path: str, parse: Callable[[Any], Any]) -> Any:
    try:
        with urllib.request.urlopen(f"{address}{path}", timeout=ANSWER_TIMEOUT_S) as answer:
            return parse(answer)
    except (OSError, ValueError) as error:
        raise BenchError(f"{address}{path} does not answer: {error}") from error


@asynccontextmanager
async def _connection(address: Address, path: str, body: Body) -> AsyncGenerator[asyncio.StreamReader]:
    """A connection of its own, on which the request was sent; closed at the end, whatever has been read."""
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port)
    except OSError as error:
        raise BenchError(f"{address} takes no connection: {error}") from error
    try:
        writer.write(request_bytes(address, path, body))
        await writer.drain()
        yield reader
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        raise BenchError(f"{address}{path} broke off: {error}") from error
    finally:
        writer.close()


def request_bytes(address: Address, path: str, body: Body) -> bytes:
    """A request for a stream, on a connection that ends with its answer."""
    payload = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address.host}:{address.port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


async def _events(reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    """The data of each event of a chunked answer. Raises: BenchError for another status than 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].decode()
    if " 200" not in status:
        rest = await reader.read(2000)
        raise BenchError(f"the server answered {status}: {rest.decode(errors='replace')}")
    unread = b""
    while num_bytes := int(await reader.readuntil(b"\r\n"), 16):
        unread += (await reader.readexactly(num_bytes + 2))[:-2]
        *whole, unread = unread.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):  # others are comments
                yield event.removeprefix(b"data: ")


def parsed_event(data: bytes) -> Any:
    """What an event holds; an empty object at the end. Raises: BenchError if it tells of an error."""
    event = {} if data == b"[DONE]" else json.loads(data)
    if "error" in event:
        raise BenchError(f"the server ended a stream with an error: {event['error']}")
    return event


def text_of(event: Any) -> str:
    """What a chunk of a completion or of a chat adds to the first choice."""
    choices = event.get("choices")
    if not choices:
        return ""
    choice = choices[0]
    return str((choice["delta"].get("content") if "delta" in choice else choice.get("text")) or "")
