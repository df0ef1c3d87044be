"""A local server that speaks the chat completions wire format of OpenAI (https://platform.openai.com/docs/api-reference/chat).

The test writes the script: what each call is answered with, and when a stream goes on.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.dev.servers.ports import HOST, free_port
from gateway.server.serve import QuietServer
from tests.support.serving import wait_for

MODEL = "gpt-test-2026"
USAGE = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}


Fault = tuple[int, dict[str, str]] | str


class Cut(Exception):
    """The connection ends in the middle of an answer."""


class ModelServer:
    """Answers with `tokens`, after the `faults` that come first.

    A fault is a status with its headers, "cut" (the connection breaks after the first token), or "truncated" (the answer
    stops after it, in good order but without an end). While `holding`, a stream waits before its last token until
    `release` is called; with `slow_first` it waits before its first.
    """

    def __init__(self) -> None:
        self.url = ""
        self.tokens = ["Good", " day", "!"]
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.holding = False
        self.slow_first = False
        self.cancelled = 0
        self._go = asyncio.Event()

    def release(self) -> None:
        """Lets a stream that waits go on."""
        self._go.set()

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, tuple):
            error = {"error": {"message": "the server is told to fail", "type": "server_error", "code": None}}
            return JSONResponse(error, fault[0], fault[1])
        if body.get("stream"):
            usage = (body.get("stream_options") or {}).get("include_usage", False)
            return StreamingResponse(self._stream(fault, usage), media_type="text/event-stream")
        if fault == "cut":
            return StreamingResponse(self._broken(), media_type="application/json")
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(self.tokens)}, "finish_reason": "stop"}
        return JSONResponse(self._envelope("chat.completion") | {"choices": [choice], "usage": USAGE})

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "object": kind, "created": 1_790_000_000, "model": MODEL}

    async def _broken(self) -> AsyncIterator[bytes]:
        yield b'{"id": "chatcmpl-1", "choices": [{"ind'
        raise Cut

    async def _stream(self, fault: str | None, usage: bool) -> AsyncIterator[bytes]:
        def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            return self._line(self._envelope("chat.completion.chunk") | {"choices": [choice]})

        try:
            if self.slow_first:
                await self._go.wait()
            yield chunk({"role": "assistant", "content": ""})
            for n, token in enumerate(self.tokens):
                if self.holding and n == len(self.tokens) - 1:
                    await self._go.wait()
                yield chunk({"content": token})
                if fault == "cut":
                    raise Cut
                if fault == "truncated":
                    return
            yield chunk({}, "stop")
            if usage:
                yield self._line(self._envelope("chat.completion.chunk") | {"choices": [], "usage": USAGE})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _line(self, value: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(value).encode() + b"\n\n"


@asynccontextmanager
async def model_server() -> AsyncIterator[ModelServer]:
    """The server, on a port of its own; `url` is what an agent's base_url names."""
    models = ModelServer()
    app = Starlette(routes=[Route("/v1/chat/completions", models.complete, methods=["POST"])])
    port = free_port()
    config = uvicorn.Config(app, host=HOST, port=port, log_config=None, lifespan="off", ws="none")
    server = QuietServer(config)
    task = asyncio.create_task(server.serve())
    await wait_for(lambda: server.started or task.done(), "the model server starts")
    models.url = f"http://{HOST}:{port}/v1"
    try:
        yield models
    finally:
        models.release()
        server.should_exit = True
        await task
