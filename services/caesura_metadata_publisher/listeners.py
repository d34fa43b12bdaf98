"""The listeners file: which address serves which VM. Parsing is pure; reading is one call.

The VM that asks is identified by the listener it reaches, as 169.254.169.254 is reachable from inside one VM only.
So a listener on all addresses is refused: it would let one VM read and approve as another.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from caesura.contract.names import InvalidName, check_name
from caesura.runtime.errors import ConfigError
from caesura.runtime.toml_lines import key_lines


class ListenersError(ConfigError):
    """The listeners file cannot be used; the text names the file and the entry or line."""


class Listener(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One address and the VM that asks there."""

    vm: str
    listen: Annotated[str, Meta(min_length=1)]
    """``host:port`` or ``unix:/path``."""


class _Entries(msgspec.Struct, forbid_unknown_fields=True):
    listener: list[dict[str, object]] = []


def read_listeners(path: str) -> tuple[Listener, ...]:
    """The listeners of a file.

    Raises:
        ListenersError: the file cannot be read, or describes something that cannot be served.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ListenersError(f"cannot read the listeners file {path}: {error}") from error
    return parse_listeners(text, path)


def parse_listeners(text: str, path: str) -> tuple[Listener, ...]:
    """The listeners in ``text``.

    Raises:
        ListenersError: naming ``path`` and the line (bad TOML) or the entry and key.
    """
    try:
        entries = msgspec.convert(tomllib.loads(text), _Entries)
    except tomllib.TOMLDecodeError as error:
        raise ListenersError(f"{path}: {error}") from error
    except msgspec.ValidationError as error:
        raise ListenersError(f"{path}: {error}") from error
    if not entries.listener:
        raise ListenersError(f'{path}: no listener; write [[listener]] with vm = "..." and listen = "..."')
    found: list[Listener] = []
    lines = key_lines(text)
    for index, entry in enumerate(entries.listener):
        line = lines.get(("listener", index))  # none in an inline array
        where = f"{path}: listener {index + 1}" + (f" (line {line})" if line else "")
        found.append(_listener(entry, where))
        earlier = next((i for i, other in enumerate(found[:-1]) if other.listen == found[-1].listen), None)
        if earlier is not None and not found[-1].listen.endswith(":0"):
            raise ListenersError(f"{where}: {found[-1].listen} is taken by listener {earlier + 1} already")
    return tuple(found)


def _listener(entry: dict[str, object], where: str) -> Listener:
    try:
        listener = msgspec.convert(entry, Listener)
        check_name("VM", listener.vm)
    except (msgspec.ValidationError, InvalidName) as error:
        raise ListenersError(f"{where}: {error}") from error
    if listener.listen.startswith("unix:"):
        if not listener.listen.removeprefix("unix:").startswith("/"):
            raise ListenersError(
                f"{where}: {listener.listen!r} must name an absolute path: unix:/run/vm.sock"
            )
        return listener
    host, _, port = listener.listen.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ListenersError(
            f"{where}: cannot listen on {listener.listen!r}: give host:port (127.0.0.1:8101) or unix:/path"
        )
    if host.strip("[]") in {"0.0.0.0", "::", "*"}:
        raise ListenersError(
            f"{where}: {listener.listen} would let every VM speak as {listener.vm}: name an address that only this VM reaches"
        )
    return listener
