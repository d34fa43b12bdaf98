"""``app-2: approved``: what is said of one VM only. Pure."""

from __future__ import annotations

import re

_PREFIX = re.compile(r"\s*(?P<vm>[A-Za-z0-9][A-Za-z0-9_-]*)\s*:\s*(?P<rest>.*)", re.DOTALL)


def split_vm(text: str) -> tuple[str, str]:
    """The VM's name, empty if there is none, and the rest without space around it."""
    found = _PREFIX.fullmatch(text)
    return (found["vm"], found["rest"].strip()) if found else ("", text.strip())
