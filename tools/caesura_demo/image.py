"""The demo's images, each built in a process of its own: a thread could not be stopped, and the demo would wait for it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec

from caesura.runtime.errors import CaesuraError
from caesura.runtime.processes import kill_marked
from caesura_demo.guests import GuestImage
from caesura_demo.workspace import CleanUp
from caesura_nested_host.image import Image

_STOP_S = 5.0
"""s: for a build that was asked to end to remove its partial output."""

_LOOK_S = 0.02


class _Built(msgspec.Struct):
    kernel: str
    initrd: str


class _Failed(msgspec.Struct):
    reason: str


_Manifest = TypeVar("_Manifest")

_BUILD = (sys.executable, "-m", "caesura_ctl", "guest", "build", "--json")
_BUILD_HOST = (sys.executable, "-m", "caesura_nested_host.image", "--json")


async def build_image(
    run_id: str, say: Callable[[str], None], clean_up: CleanUp, command: Sequence[str] = _BUILD
) -> GuestImage:
    """The guest's, built or taken from the cache; otherwise as ``_build``."""
    made = await _build(run_id, say, clean_up, command, _Built)
    return GuestImage(made.kernel, made.initrd)


async def build_host_image(run_id: str, say: Callable[[str], None], clean_up: CleanUp) -> Image:
    """That of a host in emulation, built or taken from the cache; otherwise as ``_build``."""
    return await _build(run_id, say, clean_up, _BUILD_HOST, Image)


async def _build(
    run_id: str,
    say: Callable[[str], None],
    clean_up: CleanUp,
    command: Sequence[str],
    manifest: type[_Manifest],
) -> _Manifest:
    """What a command builds.

    Args:
        run_id: marks the build's processes.
        say: called with each line of progress.
        command: what builds it, and prints the manifest.
        manifest: what is printed.

    Raises:
        CaesuraError: it cannot be built here; the text says why.
    """
    mark = f"CAESURA_DEMO_RUN={run_id}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "caesura.bus.pdeathsig",
        str(os.getpid()),
        *command,
        env={**os.environ, **dict([mark.split("=", 1)])},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # only the demo receives Ctrl-C
    )
    try:
        answer, reason = await asyncio.gather(_read(process.stdout), _progress(process.stderr, say))
        if await process.wait() == 0:
            return msgspec.json.decode(answer, type=manifest)
    except msgspec.DecodeError as error:
        raise CaesuraError(f"the image was built, but its manifest cannot be read: {error}") from error
    finally:
        await clean_up.step(_end(process, mark, clean_up.hurry))
    raise CaesuraError(reason or f"building the image ended with exit code {process.returncode}")


async def _read(stream: asyncio.StreamReader | None) -> bytes:
    return b"" if stream is None else await stream.read()


async def _progress(stream: asyncio.StreamReader | None, say: Callable[[str], None]) -> str:
    """Pass each line on; returns the reason of a failure, a JSON document on the last line."""
    reason = ""
    while stream is not None and (line := (await stream.readline()).decode(errors="replace").strip()):
        try:
            reason = msgspec.json.decode(line, type=_Failed).reason
        except msgspec.DecodeError:
            say(line.removesuffix(" ..."))
    return reason


async def _end(process: asyncio.subprocess.Process, mark: str, hurry: asyncio.Event) -> None:
    """End all processes of the build, at any stage."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_STOP_S):
                # Not `wait`: that also waits for child processes of the build that have its output open.
                while process.returncode is None and not hurry.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            pass
    await kill_marked(mark)
    await process.wait()
