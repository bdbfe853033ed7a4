"""Token ids as the cache wants them: one contiguous int32 array, or its little-endian bytes."""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.errors import InvalidTokenIdsError, TokenIdsTypeError

TOKEN_BYTES = 4
MAX_TOKEN_ID = 2**31 - 1
_INT32 = np.dtype(np.int32)
_CONTIGUOUS = (TOKEN_BYTES,)  # strides of one dimension, without gaps: one look instead of two
_ndarray = np.ndarray

TokenIds: TypeAlias = "Sequence[int] | array.array[int] | NDArray[Any] | Any"
"""A list, tuple, range, `array.array`, numpy array (any integer dtype, any stride) or torch tensor of ids."""

assert sys.byteorder == "little", "keys are little-endian int32; radixkv was never run on a big-endian machine"


def token_array(ids: TokenIds) -> NDArray[np.int32]:
    """`ids` as a contiguous int32 array of shape [tokens]; may share memory with `ids`. O(tokens).

    Raises:
        TokenIdsTypeError: something in it is not an integer.
        InvalidTokenIdsError: a value lies outside [0, 2**31), or `ids` is not one-dimensional.
    """
    tokens = int32_array(ids)
    check_tokens(tokens)
    return tokens


def int32_array(ids: TokenIds) -> NDArray[np.int32]:
    """As `token_array`, but values that are int32 already may be negative: `check_tokens` tells.

    What equals tokens that were checked before needs no second check. O(1) for a contiguous int32 array.
    """
    if type(ids) is _ndarray and ids.dtype is _INT32 and ids.strides == _CONTIGUOUS:
        return ids
    values = _to_numpy(ids)
    if values.ndim != 1:
        raise InvalidTokenIdsError(f"token ids must be one sequence, not an array of shape {values.shape}")
    if values.dtype.kind not in "iu":
        if values.size == 0 and not isinstance(ids, np.ndarray):
            return np.empty(0, np.int32)
        shown = f"{values[0]} at position 0" if values.size else "no values"
        raise TokenIdsTypeError(f"token ids must be integers, not {values.dtype} ({shown})")
    if values.dtype != _INT32 and values.size and (values.min() < 0 or values.max() > MAX_TOKEN_ID):
        position = int(((values < 0) | (values > MAX_TOKEN_ID)).argmax())
        raise _out_of_range(values[position], position)
    return np.ascontiguousarray(values, dtype=np.int32)


def check_tokens(tokens: NDArray[np.int32], first: int = 0) -> None:
    """Raise InvalidTokenIdsError if a token from position `first` on is negative. O(tokens)."""
    rest = tokens[first:] if first else tokens
    if len(rest) and rest.item(rest.argmin()) < 0:  # argmin costs half of what min does
        position = first + int((rest < 0).argmax())
        raise _out_of_range(tokens[position], position)


def token_bytes(ids: TokenIds) -> bytes:
    """`ids` as little-endian int32 bytes, 4 a token: what tree keys are made of. O(tokens). Raises as above."""
    return token_array(ids).tobytes()


def _to_numpy(ids: TokenIds) -> NDArray[Any]:
    if isinstance(ids, np.ndarray):
        return ids
    if isinstance(ids, list | tuple | range):
        return np.frombuffer(_int_array(ids), np.int32)
    if isinstance(ids, array.array):
        return np.array(ids) if ids.typecode != "u" else np.array(list(ids))
    if hasattr(ids, "detach") and hasattr(ids, "cpu"):  # a torch tensor, without importing torch
        return _tensor_to_numpy(ids)
    raise TokenIdsTypeError(
        f"token ids must be a list, array, numpy array or torch tensor of integers, not {type(ids).__name__}"
    )


def _tensor_to_numpy(ids: Any) -> NDArray[Any]:
    try:
        tensor = ids.detach().cpu()
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return np.asarray(tensor.numpy())
        shown = f"{tensor.flatten()[0].item()} at position 0" if tensor.numel() else "no values"
    except (RuntimeError, TypeError) as error:  # sparse, meta, quantised: nothing that holds ids
        raise TokenIdsTypeError(f"token ids must be integers, not a tensor of {ids.dtype} on {ids.device}") from error
    raise TokenIdsTypeError(f"token ids must be integers, not {tensor.dtype} ({shown})")


def _int_array(ids: Sequence[Any]) -> array.array[int]:
    # array() takes bools and anything with __index__ too, so the types are looked at first
    if not set(map(type, ids)) <= {int}:
        ids = [_checked_int(value, position) for position, value in enumerate(ids)]
    try:
        return array.array("i", ids)
    except OverflowError:
        position = next(i for i, value in enumerate(ids) if not 0 <= value <= MAX_TOKEN_ID)
        raise _out_of_range(ids[position], position) from None


def _checked_int(value: Any, position: int) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TokenIdsTypeError(
            f"token ids must be integers, not {type(value).__name__} ({value!r} at position {position})"
        )
    return int(value)


def _out_of_range(value: object, position: int) -> InvalidTokenIdsError:
    return InvalidTokenIdsError(f"token id {value} at position {position} lies outside [0, 2**31)")


def common_tokens(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many leading tokens `a` and `b` have in common. O(tokens).

    >>> common_tokens(np.array([1, 2, 3], np.int32), np.array([1, 2, 4, 5], np.int32))
    2
    """
    size = min(len(a), len(b))
    if size == 0:
        return 0
    differs = a[:size] != b[:size]
    first = int(differs.argmax())
    return first if differs[first] else size
