"""Several replicas of a server that act as one cache: where each request should go, and how it gets there.

Importing this package needs nothing but radixkv's own requirements; what needs more says so when it is used.
"""

from __future__ import annotations
