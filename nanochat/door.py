"""What every request passes before and after the app: who may come in, how much may be sent, and what is noted of it.

`Door` is an ASGI app around the app. It compares the key, reads the body (if it is short and comes soon), bounds
the time of the whole request, and leaves numbers for Prometheus (`Meters`) and one line in the log.
No line of the log has a client's own words in it: no text, no unknown path, no exception's message.

Without a key only this machine is served, and only under its own names: else a web page could reach
the server by pointing a name of its own at 127.0.0.1 (DNS rebinding). With one, all but OPEN_PATHS needs it.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.openai_api import Refused

PATHS = {"/", "/healthz", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/openapi.json"}
OPEN_PATHS = {"/", "/healthz"}  # need no key
MOST_BYTES = 1 << 20  # of a body
PATIENCE = 15  # seconds: to send a request's head, to send its body, to take in what was sent, to ask again


class Gone(Exception):
    """The client has left."""


@dataclass
class Record:
    """What is noted of a request."""

    id: str
    method: str
    path: str
    began: float
    status: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    end: str = ""  # how it ended, if not well


class Door:
    """Host, key, body and time; headers, figures and a line in the log."""

    def __init__(self, app: Callable, key: str | None, longest: float, meters: "Meters"):
        self.app, self.longest, self.meters, self.closing = app, longest, meters, False
        self.key = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope, receive, send) -> None:
        """One request. Its Record stands in scope["nanochat"], for the app to fill in the tokens."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = "/v1/models" if scope["path"].startswith("/v1/models/") else scope["path"]
        path = path if path in PATHS else "other"
        method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
        record = scope["nanochat"] = Record(f"req-{secrets.token_hex(8)}", method, path, time.monotonic())

        async def send_on(message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [
                    *message["headers"], (b"x-request-id", record.id.encode()),
                    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        try:
            if self.closing and method == "POST":  # a connection that is closed over an unread body may be reset before its answer is read
                await read_body(receive, scope["headers"])
            self.check(scope["path"], scope["headers"])
            receive_on = await read_body(receive, scope["headers"]) if method == "POST" else receive
            async with asyncio.timeout(self.longest):  # of use against one who reads a stream drop by drop
                await self.app(scope, receive_on, send_on)
        except Refused as error:
            await refusal(error)(scope, receive, send_on)
        except Gone:
            record.end = "client gone"
        except TimeoutError:
            record.end = "timeout"
            if not record.status:
                await refusal(Refused(504, "the time for this request is over", "timeout"))(scope, receive, send_on)
        except Exception as error:
            log_failure(record.id, error)
            record.end = "failed"
            if not record.status:
                await refusal(Refused(500, "the server failed; its log says where"))(scope, receive, send_on)
        finally:
            if record.end == "client gone":
                record.status = 499
            self.meters.count(record)
            log(record)

    def check(self, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Whether to let a request in. Raises Refused."""
        if self.closing:
            raise Refused(503, "the server is shutting down", "shutting_down", retry_after="5", connection="close")
        if self.key is None:
            host = re.sub(r":\d*$", "", header(headers, b"host")).strip("[]")
            if not is_loopback(host):
                message = "without a key only this machine is served, under the name localhost"
                raise Refused(403, message, "host_not_allowed")
        elif path not in OPEN_PATHS:
            kind, _, given = header(headers, b"authorization").partition(" ")
            if kind.lower() != "bearer" or not given:
                message = "no API key: send it as `Authorization: Bearer KEY`"
            elif not hmac.compare_digest(hashlib.sha256(given.strip().encode("latin-1")).digest(), self.key):
                message = "wrong API key"
            else:
                return
            raise Refused(401, message, "invalid_api_key", www_authenticate="Bearer")


async def read_body(receive: Callable, headers: list[tuple[bytes, bytes]]) -> Callable:
    """The whole body → a `receive` that gives it at once, and then what comes after. Raises Refused and Gone."""
    too_large = Refused(413, f"the body has more than {MOST_BYTES:,} bytes", "body_too_large")
    if int(header(headers, b"content-length")[:20] or 0) > MOST_BYTES:  # digits only, the parser has seen to that
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(PATIENCE):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                body += message.get("body", b"")
                if len(body) > MOST_BYTES:
                    raise too_large
                more = message.get("more_body", False)
    except TimeoutError:
        message = f"the body did not come within {PATIENCE} seconds"
        raise Refused(408, message, "body_too_slow", connection="close") from None
    pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def receive_on():
        return pending.pop() if pending else await receive()

    return receive_on


def header(headers: list[tuple[bytes, bytes]], name: bytes) -> str:
    """The first of a name, or "" if there is none."""
    return next((value.decode("latin-1") for given, value in headers if given == name), "")


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refusal(error: Refused) -> Response:
    """An error as OpenAI words it."""
    return as_json(error.body(), error.status, error.headers)


def as_json(content: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer that nobody keeps."""
    return Response(as_text(content), status, {"cache-control": "no-store"} | (headers or {}), "application/json")


def as_text(content: dict) -> bytes:
    """JSON in UTF-8, also of text that cannot be encoded."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


class Connection(H11Protocol):
    """uvicorn's, which also ends those that dawdle over a request's head, or over taking in what was sent."""

    dawdling: asyncio.TimerHandle | None = None

    def expect(self, something: bool) -> None:
        """While the client owes something, it has PATIENCE seconds."""
        if something and self.dawdling is None:
            self.dawdling = self.loop.call_later(PATIENCE, self.transport.abort)
        elif not something and self.dawdling:
            self.dawdling.cancel()
            self.dawdling = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # whatever the client has not taken in counts, also at the answer's end
        self.expect(True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.expect(self.cycle is None or self.cycle.response_complete or self.flow.write_paused)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.expect(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.expect(False)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.expect(False)


# ------------------------------------------------------------------ what is noted


class Meters:
    """What Prometheus is told. `waiting` and `running` give how many texts do."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]):
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"namespace": "nanochat", "registry": self.registry}
        self.requests = Counter("requests", "Requests; status 499: the client left", ["path", "status"], **more)
        more["buckets"] = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self.seconds = Histogram("request_seconds", "From a request's head to its answer's end", ["path"], **more)
        self.first_token = Histogram("first_token_seconds", "From the queue to the first token", **more)
        del more["buckets"]
        self.tokens = Counter("tokens", "Tokens of prompts, and tokens made", ["kind"], **more)
        Gauge("texts_waiting", "Texts in the queue", **more).set_function(waiting)
        Gauge("texts_running", "Texts in the making", **more).set_function(running)

    def count(self, record: Record) -> None:
        """A request has ended."""
        self.requests.labels(record.path, str(record.status)).inc()
        self.seconds.labels(record.path).observe(time.monotonic() - record.began)
        self.tokens.labels("prompt").inc(record.prompt_tokens)
        self.tokens.labels("completion").inc(record.completion_tokens)


def log(record: Record) -> None:
    """The line of a request."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    tokens = f"prompt={record.prompt_tokens} completion={record.completion_tokens}"
    line = f"{now} {record.id} {record.method} {record.path} {record.status} {tokens}"
    print(f"{line} {time.monotonic() - record.began:.3f}s {record.end}".rstrip(), file=sys.stderr, flush=True)


def log_failure(request_id: str, error: Exception) -> None:
    """Where something failed, without its message: that might quote a text."""
    places = "".join(traceback.format_tb(error.__traceback__))
    print(f"{request_id} failed: {type(error).__name__}\n{places}", end="", file=sys.stderr, flush=True)
