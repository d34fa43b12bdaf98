"""Files as a bad disk or memory leaves them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from caesura.runtime.errors import StoreError

_ROUNDS = 400


def flip_bits(path: Path, read: Callable[[], None], *, seed: int = 1) -> list[str]:
    """Flip one bit of the file after the other, each alone, and read it; what was refused, in words.

    Only bytes that are not zero are hit: most of a fresh database is empty.

    Raises:
        Whatever ``read`` raises other than a StoreError.
    """
    whole = path.read_bytes()
    places = [number for number, byte in enumerate(whole) if byte]
    chance = random.Random(seed)
    refused = []
    for _ in range(_ROUNDS):
        damaged = bytearray(whole)
        damaged[chance.choice(places)] ^= 1 << chance.randrange(8)
        for each in path.parent.glob(f"{path.name}-*"):
            each.unlink(missing_ok=True)  # a write-ahead log of the round before; SQLite may remove it, too
        path.write_bytes(damaged)
        try:
            read()
        except StoreError as error:
            refused.append(str(error))
    return refused
