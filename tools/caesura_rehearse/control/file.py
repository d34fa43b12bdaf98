"""Where a rehearsal that runs can be asked: a private file with address and token, and the client of its control API."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from caesura.runtime.errors import CaesuraError

_ANSWER_S = 30.0  # s: only a wait takes longer than milliseconds, and says for how long


class NoRehearsal(CaesuraError):
    """No rehearsal runs here, or several do and none was named."""

    exit_code = 3


class OrderFailed(CaesuraError):
    """The rehearsal refused the order, or what was waited for did not happen."""

    exit_code = 3


class ControlAddress(msgspec.Struct, frozen=True):
    """The content of the file."""

    url: str
    token: str
    pid: int

    def to_json(self) -> bytes:
        """As it is in the file."""
        return msgspec.json.encode(self)

    def call(self, method: str, path: str, body: object = None, *, timeout_s: float = _ANSWER_S) -> Any:
        """One request; what it answers. Blocking.

        Raises:
            NoRehearsal: it does not answer.
            OrderFailed: it refuses; the text says why.
        """
        request = urllib.request.Request(  # noqa: S310 - the file's address is http
            f"{self.url}{path}",
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs none
        try:
            with opener.open(request, timeout=timeout_s) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                raise OrderFailed(_reason(error)) from error
        except OSError as error:
            raise NoRehearsal(f"the rehearsal at {self.url} does not answer: {error}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {error.code}"


def folder_of_controls() -> Path:
    """The user's private folder for these files, made if it is missing.

    Raises:
        OSError: it cannot be made, or belongs to somebody else.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        folder = Path(runtime) / "caesura-rehearse"
    else:
        folder = Path(tempfile.gettempdir()) / f"caesura-rehearse-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a private folder of this user")
    return folder


def find_control(file: Path | None) -> ControlAddress:
    """The rehearsal of ``file``; without one, the only one that runs.

    Raises:
        NoRehearsal: there is none, or there are several.
    """
    if file is not None:
        found = _read(file)
        if found is None:
            raise NoRehearsal(f"{file} is not the control file of a rehearsal that runs")
        return found
    try:
        files = sorted(folder_of_controls().glob("*.json"))
    except OSError as error:
        raise NoRehearsal(f"cannot look for rehearsals: {error}") from error
    running = {each: address for each in files if (address := _read(each)) is not None}
    if not running:
        raise NoRehearsal("no rehearsal runs here: start one with caesura rehearse")
    if len(running) > 1:
        names = ", ".join(str(each) for each in running)
        raise NoRehearsal(f"several rehearsals run: name one with --control: {names}")
    return next(iter(running.values()))


def _read(file: Path) -> ControlAddress | None:
    """The address, None if its rehearsal is gone; the file of one that was killed is removed."""
    try:
        address = msgspec.json.decode(file.read_bytes(), type=ControlAddress)
    except (OSError, msgspec.DecodeError):
        return None
    if not Path(f"/proc/{address.pid}").exists():
        with suppress(OSError):
            file.unlink()
        return None
    return address
