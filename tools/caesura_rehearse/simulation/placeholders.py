"""Words of a program's arguments that differ from VM to VM: ``{vm}``, ``{set}``, ``{n}``, ``{port}``. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from caesura.runtime.errors import ConfigError
from caesura_rehearse.simulation.members import SetMember, hint_for

NAMES = ("vm", "set", "n", "port")
WORDS = ", ".join(f"{{{name}}}" for name in NAMES)
_WORD = re.compile(r"(?<![${])(?P<braces>\{+)(?P<name>[a-z_]+)(?P<end>\}+)")


class UnknownPlaceholder(ConfigError):
    """A word in braces that is not one of the placeholders."""


def arguments_of(argv: Sequence[str], member: SetMember, port: int, *, strict: bool) -> tuple[str, ...]:
    """A VM's own words of the command line. Raises UnknownPlaceholder."""
    values = {"vm": member.vm, "set": member.set, "n": str(member.number), "port": str(port)}
    return fill(argv, values, strict=strict)


def fill(argv: Sequence[str], values: Mapping[str, str], *, strict: bool) -> tuple[str, ...]:
    """The arguments with their placeholders filled in. ``{{vm}}`` is ``{vm}``; ``${name}``, a variable of a shell, is left alone.

    Args:
        values: of each of ``NAMES``.
        strict: refuse words in braces that are not placeholders: where several VMs run the same program, one is a misspelt
            placeholder more often than text.

    Raises:
        UnknownPlaceholder: naming it and the argument.
    """

    def filled(word: str, number: int) -> str:
        def replacement(found: re.Match[str]) -> str:
            name, depth = found["name"], min(len(found["braces"]), len(found["end"]))
            if depth > 1:
                return found[0][1:-1] if name in values or strict else found[0]
            if name in values:
                return found[0].replace(f"{{{name}}}", values[name])
            if strict:
                raise UnknownPlaceholder(
                    f"argument {number} of the program has the unknown placeholder {{{name}}}{hint_for(name, NAMES)}; "
                    f"write {{{{{name}}}}} for {{{name}}} itself"
                )
            return found[0]

        return _WORD.sub(replacement, word)

    return tuple(filled(word, number) for number, word in enumerate(argv))
