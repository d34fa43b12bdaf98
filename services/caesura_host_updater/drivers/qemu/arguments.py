"""One word of a QEMU command line after the other: options, their settings, and settings changed. Pure.

Settings come as ``kind,key=value,...`` or as a JSON object (``-object``, ``-device``, ``-netdev``, ``-blockdev``); both
are read as the same flat keys: ``file.filename`` is the ``filename`` of the object ``file``. Source: qemu(1), and
QEMU's ``docs/devel/qapi-code-gen.rst`` ("keyval").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_FLAGS = frozenset(
    [
        "-S",
        "-daemonize",
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        "-snapshot",
        "-no-reboot",
        "-no-shutdown",
        "-enable-kvm",
        "-no-acpi",
        "-no-hpet",
        "-usb",
        "-mem-prealloc",
        "-s",
        "-singlestep",
        "-full-screen",
        "-win2k-hack",
        "-no-fd-bootchk",
        "-show-cursor",
        "-no-quit",
        "-preconfig",
        "-only-migratable",
        "-xen-attach",
        "-semihosting",
        "-old-param",
        "-enable-fips",
        "-nouserconfig",
        "-curses",
    ]
)
_KIND = {
    "-object": "qom-type",
    "-device": "driver",
    "-netdev": "type",
    "-blockdev": "driver",
    "-chardev": "backend",
    "-audiodev": "driver",
    "-display": "type",
    "-machine": "type",
    "-M": "type",
}
"""The key that the first word stands for, by option."""


def options(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options of a command line with their values; a word that is not an option is ``("", word)``."""
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            yield "", word
            continue
        option = word[1:] if word.startswith("--") else word
        yield option, None if option in _FLAGS else next(words, None)


def words_of(option: str, value: str | None) -> list[str]:
    """An option as it stands on a command line."""
    return ([option] if option else []) + ([value] if value is not None else [])


def escaped(value: str) -> str:
    """A value as it stands between QEMU's commas."""
    return value.replace(",", ",,")


def parse_json(value: str | None) -> dict[str, Any] | None:
    """The JSON object that a value is; None: it is none."""
    if value is None or not value.startswith("{"):
        return None
    try:
        found = json.loads(value)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def settings(option: str, value: str | None) -> tuple[str, dict[str, str]]:
    """The kind (``memory-backend-file``, ``tap``, ``virtio-blk-pci``) and the flat keys; a lone key is ``on``.

    JSON that cannot be read has no kind and no keys.
    """
    key = _KIND.get(option, "")
    if value is not None and value.startswith("{"):
        found = _flat(parse_json(value) or {})
        return found.get(key, ""), found
    found, kind = {}, ""
    for index, part in enumerate(_parts(value)):
        name, equals, text = part.partition("=")
        if not equals and index == 0:
            kind = part
        elif part:
            found[name] = text if equals else "on"
    return kind or found.get(key, ""), found


def repeated(value: str | None, key: str) -> list[str]:
    """Every value of a setting that may be given more than once, such as ``hostfwd``."""
    if (data := parse_json(value)) is not None:
        listed = data.get(key, [])
        each = listed if isinstance(listed, list) else [listed]
        return [str(one.get("str", "")) if isinstance(one, dict) else str(one) for one in each]
    parts = (part.partition("=") for part in _parts(value))
    return [text for name, equals, text in parts if equals and name == key]


def _parts(value: str | None) -> list[str]:
    return [each.replace("\0", ",") for each in (value or "").replace(",,", "\0").split(",")]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found |= _flat({str(index): each for index, each in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, bool):
            found[prefix + key] = "on" if value else "off"
        else:
            found[prefix + key] = str(value)
    return found


def is_on(found: Mapping[str, str], key: str, *, default: bool = False) -> bool:
    """Whether a setting is switched on."""
    return found[key] in ("on", "yes", "true", "y") if key in found else default


def with_setting(value: str, key: str, new: str | None) -> str:
    """Settings with one top-level key changed or added; ``new`` None: without it."""
    if (data := parse_json(value)) is not None:
        data.pop(key, None)
        return json.dumps(data if new is None else {**data, key: new})
    parts = value.replace(",,", "\0").split(",")
    changed = None if new is None else f"{key}={escaped(new)}"
    found = any(part.partition("=")[0] == key for part in parts)
    kept = [
        changed if part.partition("=")[0] == key else part
        for part in parts
        if part.partition("=")[0] != key or changed is not None
    ]
    if not found and changed is not None:
        kept.append(changed)
    return ",".join(part for part in kept if part is not None).replace("\0", ",,")
