"""What can go wrong, and what to do about it.

Every error that radixkv raises on purpose is a `RadixKVError`; most are also the built-in exception that a caller
would expect, so `except ValueError` works too.

    RadixKVError
    ├── InvalidTokenIdsError (ValueError)     ids hold a negative or too large value, or have the wrong shape
    ├── TokenIdsTypeError (TypeError)         ids are not integers
    ├── InvalidPagesError (ValueError)        page ids do not fit the tokens they are given for
    ├── InvalidRequestError (ValueError)      a prompt or an argument of a request cannot be served
    │   ├── InvalidSamplingParamsError        a sampling field is out of its range
    │   ├── PromptTooLongError                the prompt does not fit the context or the pool
    │   ├── MissingTokenizerError             text was given, but the model came without a tokenizer
    │   └── MissingChatTemplateError          a chat turn was given, but the tokenizer has no chat template
    ├── ConfigError (ValueError)              an engine or cache setting is out of its range
    ├── MissingPackageError (ImportError)     an optional package is not installed; the message says which
    ├── ModelNotFoundError (OSError)          no model can be loaded from there
    ├── ModelLoadError (OSError)              a model is there, but its files are damaged, incomplete or do not fit
    ├── UnsupportedModelError (ValueError)    the model does not run on paged attention
    ├── UnsupportedBackendError (ValueError)  the attention backend cannot serve this model here
    ├── OutOfPagesError (MemoryError)         nothing is left to evict and the pages do not suffice
    ├── PolicyError (RuntimeError)            a method of an eviction policy raised an exception
    ├── NonFiniteLogitsError (ArithmeticError) the model returned NaN or infinity for a request
    ├── SessionFileError (OSError)            a saved session cannot be written, read or used here
    ├── TierError (RuntimeError)              a store below the pool cannot be opened, or its medium fails
    ├── SessionBusyError (RuntimeError)       a session was changed amid a turn of the same thread
    ├── ClosedError (RuntimeError)            a lease, session or engine was used after it was closed
    ├── QueueFullError (RuntimeError)         too many requests wait already; try again later
    ├── EngineFailedError (RuntimeError)      the engine's thread ended because of an error; make a new engine
    ├── NoReplicaError (RuntimeError)         no replica can take a request; try again later
    └── InvariantError (AssertionError)       a bug of ours: the bookkeeping contradicts itself
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RadixKVError(Exception):
    """Base of all errors that radixkv raises on purpose."""


class InvalidTokenIdsError(RadixKVError, ValueError):
    """Token ids hold a value outside [0, 2**31), or do not form one sequence."""


class TokenIdsTypeError(RadixKVError, TypeError):
    """Token ids are not integers."""


class InvalidPagesError(RadixKVError, ValueError):
    """Page ids do not fit the tokens they are given for."""


class InvalidRequestError(RadixKVError, ValueError):
    """A request cannot be served as it was asked."""


class InvalidSamplingParamsError(InvalidRequestError):
    """A field of `SamplingParams` is out of its range; the message names the field."""


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for a single new token in the context window or the KV pool."""


class MissingTokenizerError(InvalidRequestError):
    """Text was given to a model that came without a tokenizer; pass token ids."""


class MissingChatTemplateError(InvalidRequestError):
    """A chat turn was given to a tokenizer without a chat template; use `append` and `generate`."""


class ConfigError(RadixKVError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class MissingPackageError(RadixKVError, ImportError):
    """A part of radixkv needs packages that are not installed; the message says how to install them."""


class ModelNotFoundError(RadixKVError, OSError):
    """Nothing that can be loaded as a model lies at the given place."""


class ModelLoadError(RadixKVError, OSError):
    """The files of a model are damaged, incomplete or contradict each other; the message names the file or tensors."""


class UnsupportedModelError(RadixKVError, ValueError):
    """The model does not run on paged attention, so it would be served wrongly."""


class UnsupportedBackendError(RadixKVError, ValueError):
    """The attention backend cannot serve this model on this machine."""


class OutOfPagesError(RadixKVError, MemoryError):
    """Too few pages are free, and too few can be evicted, for what was asked. Nothing was taken.

    Attributes: `needed`, `free`, `evictable` and `total`, all in pages; the message says of which kind, as `what` does.
    """

    def __init__(self, *, needed: int, free: int, evictable: int, total: int, what: str = "pages") -> None:
        self.needed, self.free, self.evictable, self.total = needed, free, evictable, total
        super().__init__(
            f"{needed} {what} are needed, but only {free} of {total} are free and {evictable} can be evicted; "
            "release leases, ask for fewer tokens or make the pool larger"
        )


class PolicyError(RadixKVError, RuntimeError):
    """A method of an eviction policy raised an exception, which is this error's cause. The cache stays consistent.

    Attributes:
        freed: the pages that left the tree before an `evict`, `remove` or `clear` of it could return them, int32; empty
            after all other calls. `PrefixCache` takes them back itself.
    """

    def __init__(self, policy: str, error: BaseException) -> None:
        super().__init__(f"the eviction policy {policy!r} failed: {type(error).__name__}: {error}")
        self.freed: NDArray[np.int32] | tuple[()] = ()


class NonFiniteLogitsError(RadixKVError, ArithmeticError):
    """The model returned NaN or infinite logits for a request."""


class SessionFileError(RadixKVError, OSError):
    """A saved session cannot be written or read, is damaged or newer than this radixkv, or has another tokenizer."""


class SessionBusyError(RadixKVError, RuntimeError):
    """A session was asked for something amid a turn that the same thread has begun and not finished."""


class ClosedError(RadixKVError, RuntimeError):
    """A lease, session or engine was used after it was closed."""


class QueueFullError(RadixKVError, RuntimeError):
    """As many requests wait as may wait; nothing was queued. Try again later."""


class NoReplicaError(RadixKVError, RuntimeError):
    """No replica can take a request: there is none, or all drain or are excluded. Try again later.

    Attributes: `known` and `draining`, numbers of replicas.
    """

    def __init__(self, *, known: int, draining: int) -> None:
        self.known, self.draining = known, draining
        found = f"of {known}, {draining} drain and the others are excluded" if known else "none is known"
        super().__init__(f"a request needs a replica that takes requests; {found}")


class EngineFailedError(RadixKVError, RuntimeError):
    """The thread that runs the engine ended because of an error, which is this error's cause."""


class TierError(RadixKVError, RuntimeError):
    """A store of pages below the pool cannot be opened, or its medium fails."""


class InvariantError(RadixKVError, AssertionError):
    """The bookkeeping contradicts itself: a bug in radixkv, with the state in the message."""
