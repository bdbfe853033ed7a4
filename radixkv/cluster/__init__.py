"""Several replicas of a server that act as one cache: where each request should go, and how it gets there.

Importing this package needs nothing but radixkv's own requirements; what needs more says so when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def app(settings: Mapping[str, Any]) -> Any:
    """The application for Ray Serve: `serve run radixkv.cluster:app model=demo replicas=3`.

    Args: settings: `model`, and fields of `EngineConfig`, `ServerConfig` and `ClusterConfig`.
    Raises: ConfigError; MissingPackageError without ray.
    """
    from radixkv.cluster.serve_app import ClusterSettings, build

    return build(ClusterSettings.of(settings))
