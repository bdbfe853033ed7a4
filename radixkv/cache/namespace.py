"""Namespaces: requests in different ones never share."""

from __future__ import annotations

from typing import Any, NamedTuple

from radixkv.errors import InvalidRequestError


class Namespace(NamedTuple):
    """What keeps requests apart: an application's own key, and a secret salt.

    Two requests share a prefix only if both parts are equal. Make one from what a caller gave with `Namespace.of`,
    once, where it comes in; inside it is passed whole.
    """

    extra_key: str | None = None
    cache_salt: str | None = None

    @classmethod
    def of(cls, extra_key: object = None, cache_salt: object = None) -> Namespace:
        """The namespace of `extra_key` and `cache_salt`. O(1).

        Raises: InvalidRequestError if one of them is neither text nor None.

        >>> Namespace.of("tenant-a")
        Namespace(extra_key='tenant-a', cache_salt=None)
        """
        if extra_key is None and cache_salt is None:
            return SHARED
        _check("extra_key", extra_key)
        _check("cache_salt", cache_salt)
        namespace: Namespace = _new_tuple(cls, (extra_key, cache_salt))
        return namespace


SHARED = Namespace()
"""The namespace of requests that name none."""

_new_tuple: Any = tuple.__new__  # Namespace(...) costs 0.3 µs; this skips its Python wrapper


def _check(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"{name} must be text or None, not {value!r}")
