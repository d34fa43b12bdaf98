"""The root of every error that Caesura raises on purpose.

Each error carries data (what, the limit, the value) and a text that says what to do. Low-level
exceptions do not cross a port: they are chained as the cause of one of these.
"""

from __future__ import annotations


class CaesuraError(Exception):
    """Something that Caesura refused or failed to do, explained for the operator."""

    exit_code = 1
    """The exit code of a service that ends with this error."""


class ConfigError(CaesuraError):
    """The configuration is wrong: nothing was started, and a restart without a change will not help."""

    exit_code = 2


class StoreError(CaesuraError):
    """The durable store could not write or read a record (full disk, locked, broken file)."""

    temporary = False
    """Whether a retry may succeed without a change to the file: a full disk, or one that does not answer."""


class NewerStore(StoreError):
    """The durable store was written by a newer version: this one must not guess its content, and a restart will not help."""

    exit_code = ConfigError.exit_code


class SyncFailed(StoreError):
    """An fsync failed: the writes may not be on disk, and no later fsync shows whether they are. The process has to end.

    Args:
        path: of the store.
        why: the cause.
    """

    def __init__(self, path: str, why: object) -> None:
        super().__init__(
            f"cannot sync the store {path}: {why}. Its last writes may not be on the disk, and none of them was published. Check "
            "at the disk (dmesg, its free space and quota), then start the service again: it continues from what is on the disk."
        )
