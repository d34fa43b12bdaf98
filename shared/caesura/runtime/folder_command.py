"""Small commands with one action on the state folder of a stopped service."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from caesura.runtime.errors import CaesuraError


def run_on_folder(usage: str | None, work: Callable[[Path], str]) -> None:
    """Run ``work`` with the folder on the command line and print its answer; on failure print the reason and exit with 1.

    Args:
        usage: printed where the command line is anything but one folder.
    """
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):  # the program's name and a folder
        sys.exit(usage)
    try:
        answer = work(Path(sys.argv[1]))
    except CaesuraError as error:
        sys.exit(str(error))
    print(answer)  # noqa: T201 - the command's answer
