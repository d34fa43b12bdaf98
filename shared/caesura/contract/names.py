"""Names that are valid in a topic level, and the two name spaces built on them.

Some brokers map ``.`` or ``/`` inside a topic level to something else, so host, set and VM names keep to
``[A-Za-z0-9_-]``. A name with a leading underscore is reserved: a VM outside any availability set is a
set of its own, named ``_<vm>``, and no operator's set may be mistaken for it.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from caesura.runtime.errors import CaesuraError

NAME_PATTERN = r"^[A-Za-z0-9_-]{1,63}\Z"

Name = Annotated[
    str,
    Meta(pattern=NAME_PATTERN, description="One topic level: letters, digits, `_` and `-`, 1 to 63 of them."),
]

_VM_NAME_MAX = 62
_ALLOWED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


class InvalidName(CaesuraError):
    """A name that is not valid in a topic level."""

    def __init__(self, kind: str, value: str, why: str) -> None:
        self.kind = kind
        self.value = value
        super().__init__(f"{kind} name {value!r} {why}")


def is_name(value: str) -> bool:
    """Whether ``value`` is valid in a topic level."""
    return 1 <= len(value) <= 63 and set(value) <= _ALLOWED


def check_name(kind: str, value: str) -> str:
    """Return ``value`` if an operator may use it as a name.

    Raises:
        InvalidName: with the kind of thing, the value and what is wrong with it.
    """
    if not is_name(value):
        raise InvalidName(
            kind, value, "is not 1 to 63 of A-Z a-z 0-9 _ - (it becomes one level of an MQTT topic)"
        )
    if kind == "VM" and len(value) > _VM_NAME_MAX:
        raise InvalidName(
            kind, value, f"is longer than {_VM_NAME_MAX} characters (with an underscore it names a set)"
        )
    if value.startswith("_"):
        raise InvalidName(kind, value, "starts with an underscore, which is reserved for VMs outside any set")
    return value


def own_set(vm: str) -> str:
    """The set of its own that a VM outside any availability set forms: one VM in update domain 0."""
    return f"_{vm}"
