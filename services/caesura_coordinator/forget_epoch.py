"""``python -m caesura_coordinator.forget_epoch FOLDER``: the way back from an epoch that no coordinator has claimed.

The coordinator then takes the next one from what hosts obey and from what is announced on the bus, as with a new store; rollouts
and documents stay. Run it while the coordinator is stopped; FOLDER is its state folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from caesura.runtime.errors import CaesuraError
from caesura.runtime.lock import StateFolderUnusable, sole_user
from caesura_coordinator.store import Store


def forget_epoch(folder: Path) -> int:
    """Make the coordinator of this state folder claim as with a new store; what it had claimed.

    Raises:
        InUse: the coordinator runs.
        StateFolderUnusable: there is no store in it.
        StoreError: the store refused.
    """
    path = folder / "coordinator.sqlite"
    if not path.is_file():
        raise StateFolderUnusable(
            f"{folder} holds no coordinator.sqlite: give the state folder of a coordinator"
        )
    with sole_user(str(folder)):
        store = Store(str(path))
        try:
            claimed = store.epoch()
            store.save_epoch(0)
        finally:
            store.database.close()
    return claimed


def main() -> None:
    """Entry point."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):  # the program's name and a folder
        sys.exit(__doc__)
    try:
        claimed = forget_epoch(Path(sys.argv[1]))
    except CaesuraError as error:
        sys.exit(str(error))
    print(f"forgot epoch {claimed}")  # noqa: T201 - the command's answer


if __name__ == "__main__":
    main()
