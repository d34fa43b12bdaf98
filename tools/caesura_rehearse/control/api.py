"""The control API of a rehearsal: orders over HTTP on loopback, for the command line and for tests in other languages.

A client that can read the file with its address and token can order: it is private to the user. Its OpenAPI file is ``openapi.json`` beside this module.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.health import serve_app
from caesura_rehearse.control.call_dispatcher import CallDispatcher, StepMissed
from caesura_rehearse.control.file import ControlAddress, folder_of_controls
from caesura_rehearse.simulation.simulated_coordinator import UnknownEvent

OPENAPI_FILE = Path(__file__).with_name("openapi.json")
_SHUTDOWN_S = 0.2  # s: who waits for an event of a rehearsal that ends gets no answer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serve_control(calls: CallDispatcher, path: Path | None = None) -> AsyncIterator[Path]:
    """Serve the API while the block runs; gives the file that has its address and token.

    Args:
        path: of the file; None: one in the user's runtime folder, where ``caesura rehearse freeze`` looks.

    Raises:
        ConfigError: the file cannot be written.
    """
    token = secrets.token_urlsafe(24)
    app = control_app(calls, token)
    async with serve_app(app, "127.0.0.1:0", shutdown_s=_SHUTDOWN_S) as address:
        file = _write(path, ControlAddress(url=f"http://{address}", token=token, pid=os.getpid()))
        try:
            yield file
        finally:
            with suppress(OSError):
                file.unlink()


def _write(path: Path | None, address: ControlAddress) -> Path:
    try:
        file = path or folder_of_controls() / f"{os.getpid()}.json"
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(handle, "wb") as opened:  # noqa: PTH123 - a descriptor
            os.fchmod(handle, 0o600)
            opened.write(address.to_json())
    except OSError as error:
        raise ConfigError(f"cannot write the file of the control API: {error}") from error
    return file


def control_app(calls: CallDispatcher, token: str) -> web.Application:
    """The API. Every answer is JSON; a refusal has ``error``."""

    async def ask(name: str, arguments: Mapping[str, Any]) -> web.Response:
        try:
            return web.json_response(
                await calls.call(name, arguments), status=201 if name in ("order", "roll") else 200
            )
        except UnknownEvent as error:
            return _refusal(404, str(error))
        except StepMissed as error:
            return _refusal(409, str(error))
        except CaesuraError as error:
            return _refusal(400, str(error))

    async def state(_: web.Request) -> web.Response:
        return await ask("state", {})

    async def order(request: web.Request) -> web.Response:
        return await ask("order", await _body(request))

    async def roll(request: web.Request) -> web.Response:
        return await ask("roll", await _body(request))

    def of(kind: str, name: str) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await ask(name, {**await _body(request), f"{kind}_id": request.match_info[f"{kind}_id"]})

        return handle

    async def openapi(_: web.Request) -> web.Response:
        return web.Response(body=OPENAPI_FILE.read_bytes(), content_type="application/json")

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if request.path != "/openapi.json" and not secrets.compare_digest(given.encode(), token.encode()):
            return _refusal(
                401, "the token is missing or wrong: Authorization: Bearer TOKEN, as in the control file"
            )
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _refusal(error.status, error.reason)

    app = web.Application(middlewares=[guarded])
    app.router.add_get("/openapi.json", openapi)
    app.router.add_get("/v1/state", state)
    app.router.add_post("/v1/events", order)
    for name in ("cancel", "approve", "wait"):
        app.router.add_post(f"/v1/events/{{event_id}}/{name}", of("event", name))
    app.router.add_post("/v1/rollouts", roll)
    for name in ("cancel", "wait"):
        app.router.add_post(f"/v1/rollouts/{{rollout_id}}/{name}", of("rollout", f"{name}_rollout"))
    return app


async def _body(request: web.Request) -> dict[str, Any]:
    text = await request.read()
    try:
        body = json.loads(text) if text else {}
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(reason="the body must be a JSON object")
    return body


def _refusal(status: int, why: str) -> web.Response:
    return web.json_response({"error": why}, status=status)
