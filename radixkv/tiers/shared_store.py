"""Pages on a Redis or Valkey server, so that replicas load what another one has computed.

    radixkv:<store>:p:<key of the page>       a record (page_record), then the payload; expires after its last use
    radixkv:<store>:c:<key of the parent>     the tokens of the pages after it, ordered: for pages shared in part

`<store>` is the digest of the fingerprint, so replicas of other models share the server and nothing else. Names of
namespaces do not go there: keys are digests that their names and salts are part of. Each record is checked as on disk,
and its tokens are compared.

The server costs hits when it is slow, full or gone, and never more: finding and reading raise nothing, each wait ends
after `timeout_s`, and after a few failures the server is left alone for a while (`CircuitBreaker`). What is in flight
is one request to read and one to write, of `_BATCH_BYTES` at most, or of one page.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from radixkv.cache.page_keys import page_key, tail_key
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.errors import ClosedError, ConfigError, TierError
from radixkv.tiers.circuit_breaker import CircuitBreaker
from radixkv.tiers.fingerprint import Fingerprint
from radixkv.tiers.page_index import StoredPage, shared_tokens
from radixkv.tiers.page_record import NO_NAMES, DamagedRecordError, RecordFormat, payload_checksum
from radixkv.tiers.page_slots import check_page
from radixkv.tiers.page_store import FoundPage, NewPage, PageFacts, StoreStats
from radixkv.tiers.requirements import PACKAGES
from radixkv.tiers.store_counts import StoreCounts
from radixkv.tiers.store_folder import store_identity

logger = logging.getLogger(__name__)

GONE, DAMAGED, UNREACHABLE, PAUSED, SLOW = "gone", "damaged", "unreachable", "paused", "slow"
_BATCH_BYTES = 1 << 20
_BATCH_KEYS = 512
_MAX_CHILDREN = 4096  # of one parent that are found when shared in part; whole pages are found whatever their number
_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}


class SharedStore:
    """A `PageStore` on a Redis or Valkey server. Its bound and what gives way are the server's (`maxmemory`)."""

    finds_at_once = False
    name = "shared"

    def __init__(
        self,
        url: str,
        fingerprint: Fingerprint,
        payload_bytes: int,
        *,
        expire_s: int = 24 * 3600,
        timeout_s: float = 0.25,
        max_read_s: float = 10.0,
        breaker: CircuitBreaker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A store at `url`. Asks the server nothing yet: it may come later.

        Args:
            url: redis://, rediss:// (TLS), unix://, valkey:// or valkeys://; may hold user, password and database.
            expire_s: seconds after its last use for which the server keeps a page.
            timeout_s: seconds that any one answer may take.
            max_read_s: seconds that one call of `read` may take; what was not read by then is missed.

        Raises: ConfigError for another URL, MissingPackageError without the package redis.
        """
        redis = PACKAGES.module("redis")
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES:
            raise ConfigError(f"a shared store is at redis://, rediss://, unix:// or valkey://, not {parts.scheme!r}")
        self.page_size, self.payload_bytes = fingerprint.page_size, payload_bytes
        self.fingerprint = fingerprint
        self._place = f"{parts.hostname or ''}{parts.path}"  # without the password
        self._expire_s, self._max_read_s, self._clock = expire_s, max_read_s, clock
        self._breaker = breaker or CircuitBreaker()
        identity = store_identity(fingerprint, payload_bytes)
        self._format = RecordFormat(self.page_size, identity)
        self._prefix = b"radixkv:" + identity.hex().encode()
        self._failures: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        try:
            self._client = redis.Redis.from_url(
                _SCHEMES[parts.scheme] + url[len(parts.scheme) :],
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise ConfigError(f"the URL of the shared store is wrong: {error}") from None
        self._reading, self._writing = Lock(), Lock()
        self._counts = StoreCounts()
        self._is_closed = False

    def find(self, parent_key: bytes, tokens: bytes) -> list[FoundPage]:
        """As `PageStore.find`, but asks the server: two answers, and one more for each 512 pages. Raises: ClosedError.

        Empty if the server does not answer, which is counted.
        """
        with self._reading:
            self._check_open()
            try:
                return self._find(parent_key, tokens)
            except self._failures as error:
                self._failed(error)
                self._counts.missed(UNREACHABLE)
            except _PausedError:
                self._counts.missed(PAUSED)
            return []

    def _find(self, parent_key: bytes, tokens: bytes) -> list[FoundPage]:
        page_bytes = self.page_size * TOKEN_BYTES
        found: list[FoundPage] = []
        while True:
            rest = tokens[len(found) * page_bytes :][: _BATCH_KEYS * page_bytes]
            whole = [rest[start : start + page_bytes] for start in range(0, len(rest) - page_bytes + 1, page_bytes)]
            keys = [parent_key]
            for page in whole:
                keys.append(page_key(keys[-1], page))
            there = self._ask([("EXISTS", self._page_name(key)) for key in keys[1:]]) if whole else []
            count = there.index(0) if 0 in there else len(there)
            found += [FoundPage(key, page, self.page_size) for key, page in zip(keys, whole[:count], strict=False)]
            parent_key = keys[count]
            if count < _BATCH_KEYS:
                break
        wanted = tokens[len(found) * page_bytes :][:page_bytes]
        closest = self._closest(parent_key, wanted) if wanted else None
        return found if closest is None else [*found, closest]

    def _closest(self, parent_key: bytes, wanted: bytes) -> FoundPage | None:
        """The page after `parent_key` that shares the most first tokens with `wanted`."""
        name = self._children_name(parent_key)
        before, after = self._ask(
            [
                ("ZREVRANGEBYLEX", name, b"[" + wanted, b"-", b"LIMIT", 0, 1),
                ("ZRANGEBYLEX", name, b"[" + wanted, b"+", b"LIMIT", 0, 1),
            ]
        )
        best = max([*before, *after], key=lambda tokens: shared_tokens(tokens, wanted), default=b"")
        count = shared_tokens(best, wanted)
        return FoundPage(parent_key, best, count) if count else None

    def read(self, pages: Sequence[FoundPage]) -> list[bytes | None]:
        """As `PageStore.read`. Raises: ClosedError."""
        payloads: list[bytes | None] = [None] * len(pages)
        self._check_open()
        begun_s, start = self._clock(), 0
        with self._reading:
            for batch in self._batches(pages):
                reason = SLOW if self._clock() - begun_s > self._max_read_s else None
                if reason is None:
                    try:
                        answers = self._ask(
                            [("GET", self._page_name(self._key(page.parent_key, page.tokens))) for page in batch]
                        )
                    except self._failures as error:
                        self._failed(error)
                        reason = UNREACHABLE
                    except _PausedError:
                        reason = PAUSED
                if reason is not None:
                    self._counts.missed(reason, len(pages) - start)
                    break
                payloads[start : start + len(batch)] = self._checked_all(batch, answers)
                start += len(batch)
        self._counts.read(len(pages) - payloads.count(None))
        return payloads

    def _checked_all(self, pages: Sequence[FoundPage], answers: Sequence[bytes | None]) -> list[bytes | None]:
        """The payloads in answers. What is gone is no longer found from now on; what is damaged is removed."""
        payloads = [
            None if answer is None else self._checked(page, answer) for page, answer in zip(pages, answers, strict=True)
        ]
        stale: list[tuple[Any, ...]] = []
        for page, answer, payload in zip(pages, answers, payloads, strict=True):
            if answer is None:
                self._counts.missed(GONE)
                stale.append(("ZREM", self._children_name(page.parent_key), page.tokens))
            elif payload is None:
                self._counts.missed(DAMAGED)
                stale.append(("UNLINK", self._page_name(self._key(page.parent_key, page.tokens))))
        if stale:
            try:
                self._ask(stale)
            except self._failures as error:
                self._failed(error)
            except _PausedError:
                pass  # they are found out again
        return payloads

    def _checked(self, page: FoundPage, answer: bytes) -> bytes | None:
        """The payload in an answer, if it is what it should be."""
        payload = answer[self._format.record_bytes :]
        try:
            stored = self._format.unpack(0, answer[: self._format.record_bytes], NO_NAMES)
        except DamagedRecordError:
            return None
        is_right = (
            stored is not None
            and (stored.parent_key, stored.tokens) == (page.parent_key, page.tokens)
            and len(payload) == self.payload_bytes
            and payload_checksum(payload) == stored.checksum
        )
        return payload if is_right else None

    def write(self, pages: Sequence[NewPage]) -> None:
        """As `PageStore.write`; pages that the server has already are not sent. Pages sent before a failure stay.

        Raises: TierError, InvalidPagesError, ClosedError.
        """
        for page in pages:
            check_page(page, self.page_size, self.payload_bytes)
        with self._writing:
            for batch in self._batches(pages):
                names = [self._page_name(self._key(page.parent_key, page.tokens)) for page in batch]
                there = self._ask_to_write([("EXPIRE", name, self._expire_s) for name in names])
                new = [(name, page) for name, page, has in zip(names, batch, there, strict=True) if not has]
                commands: list[tuple[Any, ...]] = []
                for name, page in new:
                    commands += self._commands(name, page)
                self._ask_to_write(commands)
                self._counts.written(len(new), 0)

    def _commands(self, name: bytes, page: NewPage) -> Iterator[tuple[Any, ...]]:
        stored = StoredPage(page.parent_key, page.tokens, page.facts, checksum=payload_checksum(page.payload))
        children = self._children_name(page.parent_key)
        yield "SET", name, b"".join((self._format.pack(stored), page.payload)), "EX", self._expire_s
        yield "ZADD", children, 0, page.tokens
        yield "EXPIRE", children, self._expire_s
        yield "ZREMRANGEBYRANK", children, _MAX_CHILDREN, -1

    def touch(self, pages: Iterable[tuple[bytes, bytes, PageFacts]]) -> None:
        """Let pages be kept for `expire_s` from now on; of their facts, the server needs nothing else.

        Raises: TierError, ClosedError.
        """
        commands = []
        for parent_key, tokens, _ in pages:
            commands.append(("EXPIRE", self._page_name(self._key(parent_key, tokens)), self._expire_s))
            commands.append(("EXPIRE", self._children_name(parent_key), self._expire_s))
        with self._writing:
            for start in range(0, len(commands), _BATCH_KEYS):
                self._ask_to_write(commands[start : start + _BATCH_KEYS])

    def remove(self, parent_key: bytes) -> int:
        """As `PageStore.remove`, for all replicas. Of a parent with more than 4,096 pages after it, some may stay.

        Raises: TierError, ClosedError.
        """
        parents, num_removed = [parent_key], 0
        with self._writing:
            while parents:
                names = [self._children_name(key) for key in parents[:_BATCH_KEYS]]
                children = self._ask_to_write([("ZRANGE", name, 0, -1) for name in names])
                keys = [
                    (self._key(key, tokens), len(tokens))
                    for key, members in zip(parents, children, strict=False)
                    for tokens in members
                ]
                for start in range(0, len(keys), _BATCH_KEYS):
                    batch = [("UNLINK", self._page_name(key)) for key, _ in keys[start : start + _BATCH_KEYS]]
                    num_removed += sum(self._ask_to_write(batch))
                self._ask_to_write([("UNLINK", name) for name in names])
                whole = [key for key, num_bytes in keys if num_bytes == self.page_size * TOKEN_BYTES]
                parents = parents[_BATCH_KEYS:] + whole
        return num_removed

    def hottest(self, max_pages: int) -> list[tuple[FoundPage, PageFacts]]:
        """Nothing: what is worth keeping here, replicas know for themselves."""
        return []

    def stats(self) -> StoreStats:
        """As `PageStore.stats`. What the server holds, and of how much, is the server's to tell: 0 here."""
        return self._counts.stats(0, 0, 0)

    def close(self) -> None:
        """As `PageStore.close`."""
        self._is_closed = True
        self._client.close()
        self._client.connection_pool.disconnect()

    def _key(self, parent_key: bytes, tokens: bytes) -> bytes:
        return (page_key if len(tokens) == self.page_size * TOKEN_BYTES else tail_key)(parent_key, tokens)

    def _page_name(self, key: bytes) -> bytes:
        return self._prefix + b":p:" + key

    def _children_name(self, parent_key: bytes) -> bytes:
        return self._prefix + b":c:" + parent_key

    def _batches(self, pages: Sequence[Any]) -> Iterator[Sequence[Any]]:
        size = min(max(_BATCH_BYTES // self.payload_bytes, 1), _BATCH_KEYS)
        return (pages[start : start + size] for start in range(0, len(pages), size))

    def _ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to commands that are sent as one request.

        Raises: _PausedError if the server is left alone, or what `_failures` lists.
        """
        if not self._breaker.allows():
            raise _PausedError
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers: list[Any] = pipeline.execute(raise_on_error=False)  # else errors tell keys
        except BaseException:
            self._breaker.failed()
            raise
        self._breaker.succeeded()  # it answers, even if it is full
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _ask_to_write(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """As `_ask`. Raises: TierError, ClosedError."""
        self._check_open()
        if not commands:
            return []
        try:
            return self._ask(commands)
        except self._failures as error:
            self._failed(error)
            raise TierError(f"the shared store {self._place} cannot be written: {_line(error)}") from error
        except _PausedError:
            raise TierError(
                f"the shared store {self._place} is left alone for {self._breaker.pause_left_s:.1f} s after failures"
            ) from None

    def _failed(self, error: Exception) -> None:
        if self._counts.failed(_line(error)):
            logger.warning("the shared store %s fails: %s", self._place, _line(error))

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the shared store is closed")


class _PausedError(Exception):
    """The server is left alone after failures."""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
