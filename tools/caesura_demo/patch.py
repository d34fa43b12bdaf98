"""The demo's update: ``python -m caesura_demo.patch SECONDS FILE``. Standard library only.

From outside it looks like a real one: it takes some time while the VMs are paused, and leaves
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
