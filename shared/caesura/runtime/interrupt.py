"""Ctrl-C while a program's modules load. Imports only what Python has loaded already, since it runs first."""

from __future__ import annotations

import sys

EXIT_INTERRUPTED = 130


class QuietInterrupt:
    """End the program with 130 and without a traceback when it is interrupted in the block.

    Put around the imports of a ``__main__``: on a busy machine they take seconds, and nothing else handles
    a signal yet.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        if kind is KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)
