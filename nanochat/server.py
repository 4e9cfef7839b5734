"""An HTTP server that answers as OpenAI's does: chat, completions, models; and a page to chat at, at /.

    python -m nanochat.server --checkpoint out/finetuned

A request passes the door (door.py), is checked and becomes an order of texts (openai_api.py), which the
batcher's thread makes beside those of all others (batching.py). What it makes comes back into the event loop
through a queue of this request, and goes out whole, or piece by piece as server-sent events. A client
that goes away cancels its texts at once.

The key is in the environment variable NANOCHAT_API_KEY or in --api-key-file; without one the server listens
on this machine only. SIGTERM and Ctrl-C end it, with exit code 143 or 130, once all that was accepted is
answered; a second one ends it at once.
"""

import argparse
import asyncio
import base64
import hashlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException
    from starlette.responses import Response, StreamingResponse
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    print(f"error: no {missing.name}; pip install 'nanochat-gpt2[serve]'", file=sys.stderr)
    sys.exit(2)

from nanochat import InputError, checkpoint, packed, runtime
from nanochat.batching import Batcher, Closed, Full, Job
from nanochat.classifier import GPTClassifier
from nanochat.door import (
    PATIENCE,
    Connection,
    Door,
    Gone,
    Meters,
    Record,
    as_json,
    as_text,
    is_loopback,
    log_failure,
    refusal,
)
from nanochat.openai_api import ChatRequest, Choice, CompletionRequest, Entry, Order, Refused, Served, what_is_wrong

KEY_VARIABLE = "NANOCHAT_API_KEY"
MOST_CONNECTIONS = 500


# ------------------------------------------------------------------ the app


def create_app(served: Served, batcher: Batcher, key: str | None = None, request_timeout: float = 300) -> Door:
    """The ASGI app; its shutdown closes the batcher."""
    meters = Meters(lambda: len(batcher.waiting), lambda: len(batcher.running))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close, finish=False)  # nothing is left, unless the time to finish was over

    app = FastAPI(title="nanochat", version="1", lifespan=lifespan, responses=ERRORS,
                  docs_url=None, redoc_url=None,  # those pages load scripts from elsewhere
                  telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False})
    door = Door(app, key, request_timeout + PATIENCE, meters)
    page, page_headers = read_page()

    @app.get("/", response_class=Response, responses={200: {"content": {"text/html": {}}}})
    async def chat_page() -> Response:
        """The page to chat at."""
        return Response(page, media_type="text/html", headers=page_headers)

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while requests are taken."""
        if not batcher.thread.is_alive():
            raise Refused(503, "no texts are made any more", "shutting_down")
        return as_json({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(meters.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model that is served, with its context, limit, and system text."""
        return as_json({"object": "list", "data": [served.about()]})

    @app.get("/v1/models/{name:path}")
    async def model_of_name(name: str) -> Response:
        """The same by its name."""
        served.check_name(name)
        return as_json(served.about())

    @app.post("/v1/chat/completions", response_class=Response, responses=ANSWER)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """A conversation → the assistant's next message."""
        return await respond(request, await asyncio.to_thread(served.chat, body))

    @app.post("/v1/completions", response_class=Response, responses=ANSWER)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Texts → their continuations."""
        return await respond(request, await asyncio.to_thread(served.completion, body))

    async def respond(request: Request, order: Order) -> Response:
        """The answer, whole or as a stream. Until a stream's first token an error is still a status of its own."""
        record: Record = request.scope["nanochat"]
        record.prompt_tokens = order.prompt_tokens
        steps = make(request, order, batcher, request_timeout, record, meters)
        if order.stream:
            first = await anext(steps)
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # a proxy passes on each event at once
            return StreamingResponse(events(order, first, steps, record), 200, headers, "text/event-stream")
        texts = [""] * len(order.choices)
        entries: list[list[Entry]] = [[] for _ in order.choices]
        async for choice, piece, certain in steps:
            texts[choice.index] += piece
            entries[choice.index] += certain
        return as_json(order.answer(texts, entries))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refusal(what_is_wrong(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        known = {404: "there is nothing at this path", 405: "this path takes another method"}
        message = known.get(error.status_code, "the body is not JSON that can be read")
        return refusal(Refused(error.status_code, message, **dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal(Refused(500, "the server failed; its log says where"))  # the door notes it

    return door


async def make(request: Request, order: Order, batcher: Batcher, seconds: float, record: Record,
               meters: Meters) -> AsyncGenerator[tuple[Choice, str, list[Entry]]]:
    """Have an order's texts made; yields what each step makes certain.

    Raises Refused where there is no room, no time, or the model fails, and Gone.
    """
    loop, began = asyncio.get_running_loop(), time.monotonic()
    heard: asyncio.Queue = asyncio.Queue()

    def job(choice: Choice) -> Job:
        def send(item) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, (choice, item))

        return Job(choice.prompt, choice.config, send, order.served.stop_ids, order.top, began + seconds)

    async def watch() -> None:
        """Wait for the client to leave: otherwise one would learn of it from the next token, or never."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        record.end = "client gone"
        for one in jobs:
            one.cancel()
        heard.put_nowait((None, Gone()))

    jobs = [job(choice) for choice in order.choices]
    try:
        batcher.submit(*jobs)
    except Full as error:  # there is room again as soon as any text is finished
        raise Refused(429, f"{error}; try again", "queue_full", retry_after="1") from None
    except Closed as error:
        raise why_it_ended(error, seconds, record) from None
    watcher = asyncio.create_task(watch())
    try:
        left = len(jobs)
        while left:
            choice, item = await heard.get()
            if choice and choice.reason:  # ended at a stop string, and there was more on the way
                continue
            if isinstance(item, Exception):
                raise why_it_ended(item, seconds, record)
            piece, certain = choice.take(item)
            made = sum(each.made for each in order.choices)
            if made and not record.completion_tokens:
                meters.first_token.observe(time.monotonic() - began)
            record.completion_tokens = made
            if choice.reason:
                jobs[choice.index].cancel()
                left -= 1
            yield choice, piece, certain
    finally:
        watcher.cancel()
        for one in jobs:
            one.cancel()


def why_it_ended(error: Exception, seconds: float, record: Record) -> Exception:
    """What a text's failure is to the client."""
    if isinstance(error, TimeoutError):
        return Refused(504, f"not finished within {seconds:g} seconds (this server's --request-timeout)", "timeout")
    if isinstance(error, Closed):
        return Refused(503, str(error), "shutting_down", retry_after="5")
    if isinstance(error, Gone):
        return error
    log_failure(record.id, error)
    known = isinstance(error, InputError)  # such as weights that are damaged
    return Refused(500, str(error) if known else "the model failed; the server's log says where")


async def events(order: Order, first: tuple, rest: AsyncGenerator, record: Record) -> AsyncIterator[bytes]:
    """The server-sent events of a stream: chunks, or an error, and [DONE]."""
    async with aclosing(rest):
        for choice in order.choices:
            if chunk := order.opening(choice):
                yield event(chunk)
        try:
            for chunk in order.more(*first):
                yield event(chunk)
            async for step in rest:
                for chunk in order.more(*step):
                    yield event(chunk)
            if order.usage_in_stream:
                yield event(order.envelope([], chunk=True) | {"usage": order.usage()})
        except Refused as error:
            record.end = error.code or "failed"
            yield event(error.body())
        yield b"data: [DONE]\n\n"


def event(content: dict) -> bytes:
    """One server-sent event; JSON has no line breaks."""
    return b"data: " + as_text(content) + b"\n\n"


def read_page() -> tuple[bytes, dict[str, str]]:
    """chat.html, and headers by which it runs its own script and style only, and speaks to this server only."""
    page = Path(__file__).with_name("chat.html").read_bytes().replace(b"\r\n", b"\n")  # browsers hash it so

    def hash_of(tag: bytes) -> str:
        [text] = re.findall(rb"<%b[^>]*>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    policy = (f"default-src 'none'; script-src {hash_of(b'script')}; style-src {hash_of(b'style')}; connect-src 'self'; "
              "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return page, {"content-security-policy": policy, "x-frame-options": "DENY", "cache-control": "no-cache"}


# for /openapi.json
ERROR: dict = {"content": {"application/json": {"schema": {
    "type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"], "properties": {
            "message": {"type": "string"}, "type": {"type": "string"},
            "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}}}}
ERRORS: dict[int | str, dict] = {"4XX": {"description": "The request is wrong, not allowed, too large, too slow, or one too many"} | ERROR,
          "5XX": {"description": "The model failed (500), the server shuts down (503), the time is over (504)"} | ERROR}
ANSWER: dict[int | str, dict] = {200: {"description": "The answer; with stream: true, its chunks", "content": {
    "application/json": {"schema": {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"]}},
    "text/event-stream": {}}}}


# ------------------------------------------------------------------ the process


class Server(uvicorn.Server):
    """uvicorn's, with our signals: the first closes the door and lets all finish, the second ends the process."""

    def __init__(self, door: Door, request_timeout: float):
        self.door, self.received = door, 0
        super().__init__(uvicorn.Config(
            door, http=Connection, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=PATIENCE,
            h11_max_incomplete_event_size=1 << 14, timeout_graceful_shutdown=int(request_timeout) + 2 * PATIENCE))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Instead of uvicorn's handlers, while it serves."""
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python takes no handlers
            yield
            return

        def note(number: int, frame) -> None:
            """The first signal closes the door, the second ends the process."""
            if self.received:
                os._exit(128 + number)
            self.received = number
            self.door.closing = self.should_exit = True
            with suppress(OSError):
                os.write(2, b"finishing what was accepted; once more ends it at once\n")

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def read_key(file: str | None) -> str | None:
    """The key of --api-key-file or of the environment; InputError if there are two, or it cannot be sent."""
    given, source = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if file and given is not None:
        raise InputError(f"both --api-key-file and {KEY_VARIABLE} are set; keep one")
    if file:
        given, source = Path(file).read_text(encoding="utf-8-sig", errors="replace"), f"--api-key-file {file}"
    if given is None:
        return None
    given = given.strip()
    if not given:
        raise InputError(f"{source} is empty; a key is at least one letter")
    if not given.isascii() or not given.isprintable() or " " in given:
        raise InputError(f"{source}: a key is one word of ASCII letters, digits and signs")
    return given


def open_socket(host: str, port: int) -> socket.socket:
    """Bound, not listening yet: a port that is taken is a line at once, before the model is loaded."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port is {port}, must be from 0 to {(1 << 16) - 1}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        if os.name != "nt":  # there it would share a port that is taken
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; try another --port") from None
    return bound


def main() -> None:
    """Serve a checkpoint over HTTP, as OpenAI's API and as a page to chat at."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.server", description=main.__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/finetuned", help="run folder, GPT-2 folder, gpt2 … (default: out/finetuned)")
    add("--name", help="what clients call the model (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address; beyond this machine only with a key (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    add("--api-key-file", help=f"file with the key that clients must send; or set {KEY_VARIABLE}")
    add("--device", default="auto", help="cuda, cpu, cuda:1, …")
    add("--dtype", choices=runtime.DTYPES, default="float32", help="type of the weights (default: float32)")
    add("--quantize", choices=["none", "int8"], default="none", help="int8: a quarter of the size, faster, a little less exact")
    add("--compile", action="store_true", help="compile the steps of one token: half a minute at the start, then faster (on a CPU, one text at a time)")
    add("--rows", type=int, default=8, help="texts made at once (default: 8)")
    add("--queue", type=int, default=64, help="texts that may wait; one more gets 429 (default: 64)")
    add("--max-tokens", type=int, default=1024, help="most that a request may ask for (default: 1024)")
    add("--request-timeout", type=float, default=300, help="seconds from a request to its last token (default: 300)")
    args = parser.parse_args()
    for name in ("rows", "queue", "max_tokens", "request_timeout"):
        if not 0 < (value := getattr(args, name)) < 1e6:
            raise InputError(f"--{name.replace('_', '-')} is {value}, must be above 0 and below a million")
    key = read_key(args.api_key_file)
    if key is None and not is_loopback(args.host):
        raise InputError(f"--host {args.host}: other machines could use it without a key; "
                         f"set {KEY_VARIABLE} or --api-key-file")
    with open_socket(args.host, args.port) as bound:
        device = runtime.pick_device(args.device)
        model, tokenizer = checkpoint.load(args.checkpoint)
        if isinstance(model, GPTClassifier):
            raise InputError(f"{args.checkpoint} gives labels, not text; sample.py shows them")
        packed.ready(model, device, runtime.DTYPES[args.dtype], args.quantize, args.compile)
        name = args.name or os.path.basename(os.path.abspath(args.checkpoint))
        served = Served(name, tokenizer, model.config.block_size, args.max_tokens, args.queue)
        door = create_app(served, Batcher(model, args.rows, args.queue), key, args.request_timeout)
        server = Server(door, args.request_timeout)
        address, port = bound.getsockname()[:2]
        where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # its warnings are of clients that left
        with_key = "key needed" if key else "no key"
        bound.listen(MOST_CONNECTIONS)  # who follows the next line at once waits a moment, and is not refused
        print(f"{name}: chat at {where}, API at {where}/v1, {with_key}", file=sys.stderr, flush=True)
        server.run(sockets=[bound])
    if server.received:
        raise runtime.Stopped(server.received, "the server is down")


if __name__ == "__main__":
    runtime.run_as_script(main)
