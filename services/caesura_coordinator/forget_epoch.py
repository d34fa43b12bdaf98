"""``python -m caesura_coordinator.forget_epoch FOLDER``: recovers from an epoch that no coordinator has claimed.

The coordinator then derives the next epoch from what hosts obey and from what is announced on the bus, as with a new store; rollouts
and documents are kept. Run it while the coordinator is stopped; FOLDER is its state folder.
"""

from __future__ import annotations

from pathlib import Path

from caesura.runtime.folder_command import run_on_folder
from caesura.runtime.lock import StateFolderUnusable, exclusive_lock
from caesura_coordinator.store import CoordinatorStore


def forget_epoch(folder: Path) -> int:
    """Make the coordinator of this state folder claim as with a new store; returns the epoch that it had claimed.

    Raises:
        InUse: the coordinator is running.
        StateFolderUnusable: there is no store in it.
        StoreError: the store failed.
    """
    path = folder / "coordinator.sqlite"
    if not path.is_file():
        raise StateFolderUnusable(
            f"{folder} does not contain coordinator.sqlite: give the state folder of a coordinator"
        )
    with exclusive_lock(str(folder)):
        store = CoordinatorStore(str(path))
        try:
            claimed = store.epoch()
            store.save_epoch(0)
        finally:
            store.database.close()
    return claimed


def main() -> None:
    """Entry point."""
    run_on_folder(__doc__, lambda folder: f"forgot epoch {forget_epoch(folder)}")


if __name__ == "__main__":
    main()
