"""``python -m caesura_host_updater.forget_epoch FOLDER``: the recovery from an epoch that no coordinator has claimed.

A host refuses epochs far above the one that it obeys, and all below it. If what it obeys is wrong, nobody can command it until it
forgets: its journal, operations and facts stay. Run it while the host updater is stopped; FOLDER is its state folder.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from caesura.runtime.folder_command import run_on_folder
from caesura.runtime.lock import InUse, StateFolderUnusable
from caesura_host_updater.epoch_authority import EpochAuthority
from caesura_host_updater.journal import Journal


def forget_epoch(folder: Path) -> EpochAuthority:
    """Make the host of this state folder obey nobody; returns what it obeyed.

    Raises:
        InUse: its updater runs.
        StateFolderUnusable: there is no journal in it.
        StoreError: the journal refused.
    """
    path = folder / "journal.sqlite"
    if not path.is_file():
        raise StateFolderUnusable(
            f"{folder} holds no journal.sqlite: give the state folder of a host updater"
        )
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as the updater does
        journal = Journal(str(path))
        try:
            obeyed = journal.authority()
            journal.forget_authority()
        finally:
            journal.close()
    except BlockingIOError:
        raise InUse(f"the host updater of {folder} runs: stop it first") from None
    finally:
        os.close(handle)
    return obeyed


def main() -> None:
    """Entry point."""
    run_on_folder(__doc__, _answer)


def _answer(folder: Path) -> str:
    obeyed = forget_epoch(folder)
    return f"forgot epoch {obeyed.epoch} of {obeyed.coordinator or 'nobody'}"


if __name__ == "__main__":
    main()
