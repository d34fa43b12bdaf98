"""``caesura``: the operator's command."""

from __future__ import annotations

import sys

from caesura.runtime.interrupt import EXIT_INTERRUPTED
from caesura_ctl.signals import exit_on_sigterm


def main() -> None:
    """Entry point of ``caesura``."""
    exit_on_sigterm()
    try:
        # Imported here: Ctrl-C while modules load must exit as quietly as at any other time.
        from caesura_ctl.cli import caesura  # noqa: PLC0415

        caesura()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
