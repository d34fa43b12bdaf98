"""Small files that must not be misread: JSON behind a line with its checksum.

A file that was cut short, or changed by a disk or a person, is recognized as damaged; it is never misread.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

_MAGIC = b"caesura-sealed-1 "
_SUM_BYTES = 16


class Damaged(ValueError):
    """The file is not as it was written."""


def seal(data: Any) -> bytes:
    """The file's content."""
    body = json.dumps(data).encode()
    return _MAGIC + _sum(body) + b"\n" + body


def unseal(raw: bytes) -> Any:
    """What was sealed. Raises Damaged."""
    head, _, body = raw.partition(b"\n")
    if not head.startswith(_MAGIC) or head[len(_MAGIC) :] != _sum(body):
        raise Damaged(f"its checksum does not match its {len(raw)} bytes")
    try:
        return json.loads(body)
    except ValueError as error:
        raise Damaged(f"it is not JSON: {error}") from error


def is_sealed(raw: bytes) -> bool:
    """False for the plain JSON that was written before there were checksums."""
    return not raw.startswith(b"{")


def _sum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_SUM_BYTES).hexdigest().encode()
