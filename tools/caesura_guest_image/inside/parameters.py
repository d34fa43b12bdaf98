"""``caesura.KEY=VALUE`` on the kernel command line."""

from __future__ import annotations

Parameters = dict[str, str]


def read_parameters(command_line: str) -> Parameters:
    """All parameters; the last one of a name counts."""
    found: Parameters = {}
    for word in command_line.split():
        name, equals, value = word.partition("=")
        if equals and name.startswith("caesura."):
            found[name.removeprefix("caesura.")] = value
    return found
