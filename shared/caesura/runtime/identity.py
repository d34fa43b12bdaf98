"""Fresh ids. Pure modules take ids as arguments; the shells get them here."""

from __future__ import annotations

import os


def new_id() -> str:
    """A GUID in lower case, 36 characters."""
    # A version 4 UUID (RFC 9562, section 5.4) in half the time of the standard library: every message needs one.
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
