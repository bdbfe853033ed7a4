"""The optional packages that events need."""

from __future__ import annotations

from radixkv.config.optional_packages import OptionalPackages

PACKAGES = OptionalPackages("a stream of KV events", "events", {"zmq": "pyzmq", "msgpack": "msgpack"})
