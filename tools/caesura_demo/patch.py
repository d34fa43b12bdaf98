"""The demo's update: ``python -m caesura_demo.patch SECONDS FILE``. Standard library only.

It does what a real one does, as seen from outside: it takes its time while the VMs stand still, and leaves
a trace on the host.
"""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    """Take SECONDS, then append this host to FILE."""
    seconds, record = float(sys.argv[1]), sys.argv[2]
    time.sleep(seconds)
    with open(record, "a", encoding="utf-8") as file:  # noqa: PTH123 - pathlib would double the start-up time
        file.write(f"{os.environ.get('CAESURA_HOST', '?')}\n")


if __name__ == "__main__":
    main()
