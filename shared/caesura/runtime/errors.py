"""The root of every error that Caesura raises on purpose.

Each error carries data (what, the limit, the value) and a text that says what to do. Low-level
exceptions do not cross a port: they are chained as the cause of one of these.
"""

from __future__ import annotations


class CaesuraError(Exception):
    """Something Caesura refuses or could not do, in words for the person who runs it."""

    exit_code = 1
    """What a service that ends with this error exits with."""


class ConfigError(CaesuraError):
    """The configuration is wrong: nothing was started, and a new start without a change will not help."""

    exit_code = 2


class StoreError(CaesuraError):
    """The durable store could not take or give a record (full disk, locked, broken file)."""

    temporary = False
    """Whether the same may work later without anybody touching the file: a full disk, or one that does not answer."""


class NewerStore(StoreError):
    """The durable store was written by a newer version: this one must not guess what is in it, and a new start will not help."""

    exit_code = ConfigError.exit_code


class SyncFailed(StoreError):
    """An fsync failed: what was written may not be on disk, and no later fsync shows whether it is. The process has to end.

    Args:
        path: of the store.
        why: the cause.
    """

    def __init__(self, path: str, why: object) -> None:
        super().__init__(
            f"cannot sync the store {path}: {why}. What it took last may not be on the disk, and none of that was published. Look "
            "at the disk (dmesg, its free space and quota), then start the service again: it continues from what is on the disk."
        )
