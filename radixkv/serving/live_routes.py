"""The route that feeds the live page."""

from __future__ import annotations

import re
from ipaddress import ip_address

from fastapi import APIRouter, Request
from starlette.responses import Response

from radixkv.cache.namespace import Namespace
from radixkv.serving.live_view import MayRead
from radixkv.serving.service import Service, require_admin, tenant_of


def router(service: Service) -> APIRouter:
    """The route. It is not in the OpenAPI document: it never ends, and is the page's own."""
    routes = APIRouter()

    @routes.get("/v1/cache/live", include_in_schema=False)
    async def live(request: Request) -> Response:
        """What the cache holds, as server-sent events."""
        require_admin(request)
        may_read = _may_read(service, request)
        return service.stream(lambda stream: service.live.events(may_read))

    return routes


def _may_read(service: Service, request: Request) -> MayRead:
    """Which namespaces' texts the one who asks may see: those that its own requests use, without a salt.

    Where no key is needed, only someone at this machine may: and a page of another site that calls itself this machine
    by a name of its own is not.
    """
    if service.keys.is_open and not (service.config.is_local and _is_loopback(request.headers.get("host", ""))):
        return lambda namespace: False
    own = Namespace.of(tenant_of(request).namespace)
    return lambda namespace: namespace == own


def _is_loopback(host_and_port: str) -> bool:
    """Whether someone who asks for this host asks the machine that he is at.

    >>> _is_loopback("localhost:8000"), _is_loopback("127.0.0.1"), _is_loopback("[::1]:8000")
    (True, True, True)
    >>> _is_loopback("127.0.0.1.example.com:8000"), _is_loopback("10.0.0.1:8000"), _is_loopback("")
    (False, False, False)
    """
    host = re.sub(r":\d*$", "", host_and_port).removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
