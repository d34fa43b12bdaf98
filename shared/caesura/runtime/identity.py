"""Fresh ids. Pure modules take ids as arguments; the shells get them here."""

from __future__ import annotations

import uuid


def new_id() -> str:
    """A GUID in lower case, 36 characters."""
    return str(uuid.uuid4())
