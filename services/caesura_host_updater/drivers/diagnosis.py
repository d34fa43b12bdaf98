"""What a driver finds out about a host before anything is paused: for ``caesura doctor``. Pure."""

from __future__ import annotations

from typing import Literal

import msgspec


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Args:
        name: a code for automation, such as ``libvirt.daemon``.
        level: ``wrong``: VMs cannot be paused, or not safely; ``warning``: they can, with less than there could be.
        about: what was found, for people.
        remedy: what to do; empty where all is well.
    """

    name: str
    level: Literal["ok", "warning", "wrong"]
    about: str
    remedy: str = ""


def ok(name: str, about: str) -> Diagnosis:
    """All is well."""
    return Diagnosis(name=name, level="ok", about=about)


def warning(name: str, about: str, remedy: str) -> Diagnosis:
    """It works, with less than there could be."""
    return Diagnosis(name=name, level="warning", about=about, remedy=remedy)


def wrong(name: str, about: str, remedy: str) -> Diagnosis:
    """Nothing can be paused, or not safely."""
    return Diagnosis(name=name, level="wrong", about=about, remedy=remedy)
