"""What every request passes before anything of it is read: host, key and size; and the line that the log has of it."""

from __future__ import annotations

import hmac
import json
import re
import time
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException

from espalier.use.serving.options import LOOPBACK
from espalier.use.serving.requests import ApiError

MAX_BODY_BYTES = 4 * 2**20
# In the request's scope: a list of what the log's line says besides, and one of what to call at the request's end.
NOTE, AT_END = "espalier.note", "espalier.at_end"


class Gate:
    """ASGI middleware around `app`. local_only: answer only requests that name this machine as their host.

    That check keeps out web pages whose name has been pointed at 127.0.0.1; where there is a key, the key does.
    """

    def __init__(self, app: Any, api_key: str | None, local_only: bool, log: Callable[[str], None]):
        self._app, self._log = app, log
        self._key = None if api_key is None else api_key.encode("utf-8")
        self._local_only = local_only and api_key is None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, note = time.monotonic(), 0, list[str]()
        scope[NOTE], scope[AT_END] = note, list[Callable[[], None]]()

        async def counted_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(scope["method"], scope["path"], headers)
            await self._app(scope, _limited(receive), counted_send)
        except ApiError as error:
            await respond(error, counted_send)
        finally:
            for call in scope[AT_END]:
                call()
            path = re.sub(r"[^\w./-]", "?", scope["path"])[:80]
            words = [time.strftime("%H:%M:%S"), scope["method"], path, str(status or "no answer"), *note]
            self._log(" ".join([*words, f"{time.monotonic() - begin:.2f} s"]))

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise ApiError where the request is not let in."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._local_only and _host_name(host) not in LOOPBACK:
            message = f"the host {host[:80]!r} is not this machine; a server with --api_key answers to other names"
            raise ApiError(403, message, code="unknown_host")
        if self._key is not None and path.startswith("/v1"):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                message = "this server needs its API key: Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise too_large()
        # A page elsewhere may send other kinds without the browser asking this server first.
        if method == "POST" and headers.get(b"content-type", b"").partition(b";")[0].strip() != b"application/json":
            raise ApiError(
                415, "the body must be sent as Content-Type: application/json", code="unsupported_media_type"
            )


def too_large() -> ApiError:
    return ApiError(413, f"the body is over the limit of {MAX_BODY_BYTES:,} bytes", code="request_too_large")


async def respond(error: ApiError, send: Any) -> None:
    """`error` as a response of plain ASGI."""
    body = json.dumps(error.body, ensure_ascii=False).encode("utf-8")
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _limited(receive: Any) -> Any:
    """`receive` that gives up on a body which says no length and grows over the limit."""
    total = 0

    async def counted() -> Any:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MAX_BODY_BYTES:
            raise HTTPException(413, too_large().message)  # the one kind that FastAPI lets through while it reads
        return message

    return counted


def _host_name(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
