"""The HTTP side: routes, errors as OpenAI's clients know them, streams that end when nobody listens any more."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gguf_pager.errors import PagerError
from gguf_pager.serve import jobs, schemas, view
from gguf_pager.serve.batcher import Batcher, ServerClosing
from gguf_pager.serve.embeddings import Embedder
from gguf_pager.serve.metrics import Metrics
from gguf_pager.serve.seat import RequestError, Seat

PING_S = 15.0
"""A stream says that it lives so often while no token comes: proxies close what is silent for 30 to 60 seconds."""

MOST_WAITING = 256
"""Requests that wait for a sequence. One more is told to come back later, instead of holding a connection for an hour."""

MOST_BODY_BYTES = 16 << 20
"""A request at most: a context of a million tokens takes a third of it."""

_LOOK_S = 0.25


@dataclass(slots=True)
class Served:
    """What the routes serve, and how."""

    batcher: Batcher
    embedder: Embedder
    metrics: Metrics
    model: str
    api_key: str | None = None
    cors_origins: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.time)


class _Refusal(Exception):
    def __init__(self, status: int, message: str, kind: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.parameter, self.code = status, message, kind, parameter, code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.parameter, "code": self.code}}


class _Bodies:
    """Takes a request's body as JSON, and refuses one that would take memory that nobody has counted: it is read whole, before its key is looked at.

    curl -d says that it sends a form, and so do many examples of other servers. Pages of other origins are held to what they say, because what
    says application/json is asked about first by the browser.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        n_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > MOST_BODY_BYTES:
                raise HTTPException(413, f"A request may have {MOST_BODY_BYTES >> 20} MiB: send less.")
            return message

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        names = {name for name, _ in scope["headers"]}
        if b"origin" not in names:
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
        await self._app(scope, receive_bounded, send)


def _refusal(error: BaseException) -> _Refusal:
    """Return what a client is told about something that went wrong."""
    if isinstance(error, _Refusal):
        return error
    if isinstance(error, RequestError):
        return _Refusal(400, str(error), "invalid_request_error", error.parameter, error.code)
    if isinstance(error, ServerClosing):
        return _Refusal(503, str(error), "server_error", code="server_closing")
    if isinstance(error, PagerError):
        return _Refusal(500, str(error), "server_error")
    return _Refusal(500, f"The answer has failed: {type(error).__name__}: {error}", "server_error")


def make_app(served: Served) -> FastAPI:
    """Return the application; its lifetime is the caller's."""
    app = FastAPI(title="gguf-pager", docs_url="/docs", redoc_url=None)
    app.state.served = served
    if served.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=served.cors_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(_Bodies)
    pool = ThreadPoolExecutor(MOST_WAITING + 64, "gguf_pager-request")
    _add_errors(app)
    _add_generation(app, served, pool)
    _add_rest(app, served, pool)
    return app


def _add_errors(app: FastAPI) -> None:
    async def refuse(_: Request, error: Exception) -> Response:
        refusal = _refusal(error)
        return JSONResponse(refusal.body(), refusal.status, {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if not isinstance(part, int)) or None
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return await refuse(_, _Refusal(400, message, "invalid_request_error", where))

    async def missing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return await refuse(request, _Refusal(404, f"There is no {request.url.path} here: see /docs for what there is, /v1/chat/completions first of all.",
                                            "invalid_request_error"))
        return await refuse(request, _Refusal(error.status_code, str(error.detail), "invalid_request_error"))

    for kind in (_Refusal, PagerError, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, missing)


def _authorized(served: Served) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if served.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are decoded as latin-1, whatever their bytes are.
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode("latin-1"), served.api_key.encode()):
            raise _Refusal(401, "This server needs its API key, as 'Authorization: Bearer KEY'.", "authentication_error",
                           code="invalid_api_key")

    return check


# ---- generation -----------------------------------------------------------------------------------------------------

def _add_generation(app: FastAPI, served: Served, pool: ThreadPoolExecutor) -> None:
    authorized = [Depends(_authorized(served))]

    def open_seat() -> Seat:
        return Seat(served.batcher)

    @app.post("/v1/completions", dependencies=authorized)
    async def completions(request: Request, body: schemas.CompletionRequest) -> Response:
        _check_queue(served)
        asked = await asyncio.get_running_loop().run_in_executor(pool, jobs.completion_jobs, body, open_seat, served.model)
        return await _answer(request, body, pool, asked)

    @app.post("/v1/chat/completions", dependencies=authorized)
    async def chat(request: Request, body: schemas.ChatRequest) -> Response:
        _check_queue(served)
        asked = await asyncio.get_running_loop().run_in_executor(pool, jobs.chat_jobs, body, open_seat, served.model)
        return await _answer(request, body, pool, asked)


def _check_queue(served: Served) -> None:
    if served.batcher.load().n_waiting >= MOST_WAITING:
        raise _Refusal(503, f"{MOST_WAITING} requests wait already: try again later.", "server_error", code="queue_full")


async def _answer(request: Request, body: schemas.CompletionRequest | schemas.ChatRequest, pool: ThreadPoolExecutor,
                  asked: list[jobs.Job]) -> Response:
    if body.stream:
        return await _stream(body, pool, asked)
    loop = asyncio.get_running_loop()
    running = [loop.run_in_executor(pool, job.whole) for job in asked]
    try:
        while True:
            done, left = await asyncio.wait(running, timeout=_LOOK_S, return_when=asyncio.FIRST_EXCEPTION)
            if not left or any(future.exception() for future in done):
                break
            if await request.is_disconnected():
                raise _Refusal(499, "The client has gone.", "invalid_request_error")
        return JSONResponse(jobs.join([future.result() for future in running], asked))
    finally:
        for job in asked:
            job.give_up()


_END = object()


async def _stream(body: schemas.CompletionRequest | schemas.ChatRequest, pool: ThreadPoolExecutor,
                  asked: list[jobs.Job]) -> Response:
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Any] = asyncio.Queue()

    def hand_over(chunks: Iterator[jobs.Chunk]) -> None:
        try:
            for chunk in chunks:
                loop.call_soon_threadsafe(arrived.put_nowait, chunk)
            loop.call_soon_threadsafe(arrived.put_nowait, _END)
        except BaseException as error:  # noqa: BLE001  told to who reads the stream
            loop.call_soon_threadsafe(arrived.put_nowait, error)

    try:
        found = [await loop.run_in_executor(pool, job.chunks) for job in asked]
    except BaseException:
        for job in asked:
            job.give_up()
        raise

    async def events() -> AsyncIterator[bytes]:
        try:
            for chunks in found:
                loop.run_in_executor(pool, hand_over, chunks)
            n_running, first, name = len(found), None, None
            while n_running:
                try:
                    item = await asyncio.wait_for(arrived.get(), PING_S)
                except TimeoutError:
                    yield b": still computing\n\n"
                    continue
                if item is _END:
                    n_running -= 1
                elif isinstance(item, BaseException):
                    yield _event(_refusal(item).body())
                    return
                else:
                    first = first or item
                    name = name or item["id"]
                    item["id"] = name  # of all choices
                    yield _event(item)
            if first is not None and body.stream_options is not None and body.stream_options.include_usage:
                yield _event(jobs.last_chunk(first, asked))
            yield b"data: [DONE]\n\n"
        finally:
            for job in asked:
                job.give_up()

    return StreamingResponse(events(), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


# ---- everything else ------------------------------------------------------------------------------------------------

def _add_rest(app: FastAPI, served: Served, pool: ThreadPoolExecutor) -> None:
    authorized = [Depends(_authorized(served))]
    loop = asyncio.get_running_loop

    @app.get("/health")
    async def health() -> Response:
        load, failure = served.batcher.load(), served.batcher.failure
        found = {"status": "ok" if failure is None else "error", "running": load.n_running, "waiting": load.n_waiting,
                 "parallel": load.n_sequences} | ({} if failure is None else {"reason": failure})
        return JSONResponse(found, 200 if failure is None else 503)

    model = {"id": served.model, "object": "model", "created": int(served.started_s), "owned_by": "gguf-pager"}

    @app.get("/v1/models", dependencies=authorized)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", dependencies=authorized)
    async def model_by_name(name: str) -> dict[str, Any]:
        if name != served.model:
            raise _Refusal(404, f"There is no model {name!r} here, only {served.model!r}.", "invalid_request_error",
                           "model", "model_not_found")
        return model

    html = view.page()
    html_headers = view.headers(html)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html; charset=utf-8", headers=html_headers)

    @app.get("/pager", dependencies=authorized)
    def pager() -> dict[str, Any]:
        return view.snapshot(served.batcher, served.model, served.metrics.joules)

    @app.get("/metrics", dependencies=authorized)
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/embeddings", dependencies=authorized)
    async def embeddings(body: schemas.EmbeddingRequest) -> dict[str, Any]:
        vectors, n_tokens = await loop().run_in_executor(pool, served.embedder.embed, body.input)
        data: list[dict[str, Any]] = [
            {"object": "embedding", "index": i, "embedding": _base64(vector) if body.encoding_format == "base64" else vector}
            for i, vector in enumerate(vectors)]
        return {"object": "list", "data": data, "model": served.model,
                "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens}}

    @app.post("/extras/tokenize", dependencies=authorized)
    async def tokenize(body: schemas.TokenizeRequest) -> dict[str, Any]:
        return {"tokens": await loop().run_in_executor(pool, _tokenize, served, body.input)}

    @app.post("/extras/tokenize/count", dependencies=authorized)
    async def count(body: schemas.TokenizeRequest) -> dict[str, Any]:
        return {"count": len(await loop().run_in_executor(pool, _tokenize, served, body.input))}

    @app.post("/extras/detokenize", dependencies=authorized)
    async def detokenize(body: schemas.DetokenizeRequest) -> dict[str, Any]:
        if not all(0 <= token < served.batcher.llm._n_vocab for token in body.tokens):
            raise RequestError("A token lies outside the vocabulary.", "tokens")
        return {"text": served.batcher.llm.detokenize(body.tokens).decode(errors="replace")}


def _tokenize(served: Served, text: str) -> list[int]:
    found: list[int] = served.batcher.llm.tokenize(text.encode(), special=True)
    return found


def _base64(vector: list[float]) -> str:
    """Return a vector as OpenAI's clients ask for it: 32-bit floats, little-endian."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
