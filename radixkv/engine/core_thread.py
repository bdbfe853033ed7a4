"""A thread that owns an `EngineCore`: everything that the core does, it does there."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from radixkv.engine.core import EngineCore
from radixkv.engine.outputs import Progress, RequestOutput
from radixkv.engine.request import Request
from radixkv.engine.results import FinishedOutbox, Outbox
from radixkv.errors import ClosedError, EngineFailedError, QueueFullError

logger = logging.getLogger(__name__)


class Reader:
    """Takes the progress of requests in an event loop, for one task. All but `loop` belongs to the loop's thread.

    What comes while the task waits is first offered to `consume`, which spares the task: it is woken if `consume` says
    no. The last progress of a request is never offered. What `consume` raises, the next `take` raises.
    """

    def __init__(self, outbox: Outbox | FinishedOutbox, consume: Callable[[Progress], bool] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self._outbox = outbox
        self._consume = consume
        self._waiter: asyncio.Future[None] | None = None  # of a `take` that waits
        self._error: Exception | None = None
        self._consume_error: Exception | None = None

    def put(self, progress: Progress) -> None:
        """Take note of what a request gained."""
        waiter = self._waiter
        if self._consume is not None and progress.output is None and waiter is not None and not waiter.done():
            try:  # a `take` waits, so the outbox is empty
                if self._consume(progress):
                    return
            except Exception as error:
                self._consume_error = error
        self._outbox.put(progress)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Let the next `take` raise `error`, after what came before it."""
        self._error = error
        self._wake()

    async def take(self) -> Any:
        """What the outbox holds, as soon as it holds something. Raises: EngineFailedError if the core failed."""
        while True:
            if self._consume_error is not None:
                raise self._consume_error
            if taken := self._outbox.take():
                return taken
            if self._error is not None:
                raise EngineFailedError(str(self._error)) from self._error.__cause__
            self._waiter = self.loop.create_future()
            await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take_progress(self) -> Awaitable[Progress]:
        """As `take`, for a reader of one request's progress."""
        return self.take()

    def take_outputs(self) -> Awaitable[list[RequestOutput]]:
        """As `take`, for a reader of the outputs of several requests."""
        return self.take()


class _Operation(NamedTuple):
    """What the thread is to do between two steps, and who waits for the result."""

    run: Callable[[EngineCore], object]
    future: Future[Any] | None


class CoreThread:
    """Runs a core in a thread of its own, and hands progress to the event loops of its readers.

    Any thread may call any method; none of them waits for a step.

    What a step brought is handed over once the next one computes: then the interpreter is free for the loops, and they
    do not hold up what Python does for a step. If something else is to be done in between, or nothing, it goes first.

    Invariants: the core is touched by the thread alone. Each request that was accepted has a reader until its last
    progress was handed over or its reader left; a request without a reader is aborted before the next step.
    """

    def __init__(self, core: EngineCore, *, max_waiting: int) -> None:
        self._core = core
        self._max_waiting = max_waiting
        self._wake = threading.Condition()  # guards what follows
        self._inbox: list[_Operation] = []
        self._readers: dict[int, Reader] = {}
        self._num_queued = 0  # requests in the inbox
        self._num_waiting = 0  # requests in the core without pages, as of its last step
        self._end: Exception | None = None  # why nothing more is accepted
        self._kept: list[Progress] = []  # of the last step, to be handed over; the thread's own
        core.arrivals.listen(self._wake_up)
        self._thread = threading.Thread(target=self._run, name="radixkv-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], reader: Reader) -> None:
        """Queue `requests`, whose progress goes to `reader`.

        Raises: QueueFullError if more than `max_waiting` requests would wait (none is queued then); ClosedError;
            EngineFailedError.
        """
        with self._wake:
            self._check_open()
            waiting = self._num_queued + self._num_waiting
            if waiting + len(requests) > self._max_waiting:
                raise QueueFullError(
                    f"at most {self._max_waiting} requests may wait; {waiting} do, and {len(requests)} more were given"
                )
            self._num_queued += len(requests)
            self._readers.update({request.id: reader for request in requests})
            self._inbox.append(_Operation(lambda core: self._add(core, requests), None))
            self._wake.notify()

    def abandon(self, request_ids: Sequence[int]) -> None:
        """Nobody reads these requests any more: those that have not ended are aborted before the next step."""
        with self._wake:
            left = [request_id for request_id in request_ids if self._readers.pop(request_id, None) is not None]
            if left and self._end is None:
                self._inbox.append(_Operation(lambda core: [core.abort(request_id) for request_id in left], None))
                self._wake.notify()

    def call(self, function: Callable[[EngineCore], Any]) -> Future[Any]:
        """Call `function` with the core between two steps. Raises: ClosedError, EngineFailedError."""
        future: Future[Any] = Future()
        with self._wake:
            self._check_open()
            self._inbox.append(_Operation(function, future))
            self._wake.notify()
        return future

    def stop(self) -> None:
        """Accept nothing more, and let the thread abort what runs and end. Idempotent; does not wait."""
        with self._wake:
            if self._end is None:
                self._end = ClosedError("the engine was closed; make a new one")
            self._wake.notify()

    def join(self) -> None:
        """Wait for the end of the thread, after `stop`."""
        self._thread.join()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        core = self._core
        try:
            while self._do_operations():
                progress = core.step(self._deliver_kept)
                with self._wake:  # before anyone learns of the step
                    self._num_waiting = core.num_waiting
                self._deliver_kept()  # unless the step has
                self._kept = progress
            self.deliver(core.close())
        except BaseException as error:
            self._fail(error)
        finally:
            self._refuse_rest()

    def _do_operations(self) -> bool:
        """Do what came, waiting for it if there is nothing to step; False once the thread is to end."""
        if not self._core.has_work:  # so that no step is sure to follow
            self._deliver_kept()
        with self._wake:
            while not self._inbox and self._end is None and not self._core.has_work:
                self._wake.wait(self._core.wait_s)
            operations, self._inbox = self._inbox, []
            self._num_waiting, self._num_queued = self._num_waiting + self._num_queued, 0  # until the core tells
            goes_on = self._end is None
        if operations:
            self._deliver_kept()
        for operation in operations:
            _do(operation, self._core)
        with self._wake:
            self._num_waiting = self._core.num_waiting
        return goes_on

    def _wake_up(self) -> None:
        """A tier has brought something; it calls this in a thread of its own."""
        with self._wake:
            self._wake.notify()

    def _add(self, core: EngineCore, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.id in self._readers:  # else its reader has left already
                core.add(request)

    def _deliver_kept(self) -> None:
        """Hand over what the last step brought, unless that was done."""
        if self._kept:
            self.deliver(())

    def deliver(self, progress: Sequence[Progress]) -> None:
        """Hand each piece to its reader, if it has one, after what the last step brought."""
        progress, self._kept = [*self._kept, *progress], []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Reader, Progress]]] = {}
        with self._wake:
            for piece in progress:
                ended = piece.output is not None
                reader = self._readers.pop(piece.request_id, None) if ended else self._readers.get(piece.request_id)
                if reader is not None:
                    by_loop.setdefault(reader.loop, []).append((reader, piece))
        for loop, pieces in by_loop.items():
            if not _call_in(loop, _put_all, pieces):
                self.abandon([piece.request_id for _, piece in pieces])

    def _fail(self, error: BaseException) -> None:
        """Tell everybody who waits that the core has failed, and refuse what comes."""
        self._deliver_kept()
        failure = EngineFailedError(f"the engine has failed and must be made anew: {type(error).__name__}: {error}")
        failure.__cause__ = error
        with self._wake:
            self._end = failure
            readers = set(self._readers.values())
            self._readers.clear()
        for reader in readers:
            _call_in(reader.loop, reader.fail, failure)
        try:
            self._core.close()  # so that pages and leases go back, as far as the core still can
        except Exception:
            logger.exception("the engine that has failed cannot give back its pages")

    def _refuse_rest(self) -> None:
        """Answer those whose operation came too late."""
        with self._wake:
            operations, self._inbox = self._inbox, []
            readers = set(self._readers.values())
            self._readers.clear()
            end = self._end or ClosedError("the engine was closed; make a new one")
        for operation in operations:
            if operation.future is not None:
                operation.future.set_exception(end)
        for reader in readers:
            _call_in(reader.loop, reader.fail, end)

    def _check_open(self) -> None:
        if isinstance(self._end, EngineFailedError):
            raise EngineFailedError(str(self._end)) from self._end.__cause__
        if self._end is not None:
            raise ClosedError(str(self._end))


def _do(operation: _Operation, core: EngineCore) -> None:
    """Run an operation. What it raises goes to who waits for it, or ends the thread."""
    if operation.future is None:
        operation.run(core)
        return
    if not operation.future.set_running_or_notify_cancel():
        return
    try:
        operation.future.set_result(operation.run(core))
    except Exception as error:
        operation.future.set_exception(error)


def _put_all(pieces: Sequence[tuple[Reader, Progress]]) -> None:
    for reader, progress in pieces:
        reader.put(progress)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> bool:
    """Let `loop` call `function` soon; False if the loop was closed, so that nobody waits there any more."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True
