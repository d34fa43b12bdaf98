"""``caesura``: the operator's command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``caesura``."""
    try:
        # Imported here: Ctrl-C while modules load must exit as quietly as at any other time.
        from caesura_ctl.cli import caesura  # noqa: PLC0415

        caesura()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
