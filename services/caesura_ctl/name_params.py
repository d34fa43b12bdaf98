"""Names on the command line: what is valid in a topic level, and for a set also the notation of the tables."""

from __future__ import annotations

import re
from typing import Any

import click

from caesura.contract.names import is_name, own_set

_SHOWN = re.compile(r"\((.+)\)")


def read_set(text: str) -> str:
    """The name of a set given by its name, or as ``tables.set_name`` shows it."""
    found = _SHOWN.fullmatch(text)
    return own_set(found[1]) if found else text


class Name(click.ParamType[str]):
    """A click parameter that names an update, a host or a VM: an invalid one is rejected here, before it is sent."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; fails the command line if it is invalid."""
        text = str(value)
        if not is_name(text):
            self.fail(f"{text!r} is not a name: letters, digits, _ and -, 1 to 63 of them", param, ctx)
        return text


class SetName(Name):
    """A click parameter that names a set: (cache-01), as shown, is _cache-01."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The set's name; fails the command line if it is invalid."""
        read = read_set(str(value))
        return (
            read if is_name(read) else super().convert(value, param, ctx)
        )  # the latter reports the text as given


NAME = Name()
SET_NAME = SetName()
