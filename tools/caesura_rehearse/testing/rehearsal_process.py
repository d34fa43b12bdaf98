"""The process in which the rehearsals of a test run happen, and the conversation with it. Standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import IO, Any

_END_S = 30.0  # s: it ends what it has started, then itself
_SHOWN = 4000  # characters of its last words


class RehearsalError(Exception):
    """A call that cannot be carried out: an unknown event, a program that cannot be started, a bad duration."""


class RehearsalAssertion(AssertionError):
    """What was waited for did not happen. The text says what happened instead."""


class RehearsalProcess:
    """The process, and the conversation with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._count = 0

    def open(self) -> str:
        """Begin a new rehearsal; the process is started if it does not run. The address of the first VM's metadata API."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as the process
            # -P: no module of the tests' folder may be taken for one of the standard library. A session of its own: Ctrl-C is for pytest, which
            # then ends the fixture.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "caesura_rehearse.control.serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,
            )
        return str(self.ask("open")["url"])

    def ask(self, do: str, **arguments: Any) -> Any:
        """One request and its answer."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RehearsalError("the rehearsal is over")
        self._count += 1
        try:
            process.stdin.write(json.dumps({"id": self._count, "do": do, "with": arguments}).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        except BaseException:
            self._kill()  # the answer to this request must not be taken for that to another
            raise
        if not line:
            raise RehearsalError(f"the process of the rehearsal ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" not in answer:
            return answer["ok"]
        if answer["kind"] == "StepMissed":
            raise RehearsalAssertion(answer["error"])
        raise RehearsalError(answer["error"])

    def end(self) -> None:
        """End the rehearsal that is open."""
        if self._process is not None and self._process.poll() is None:
            self.ask("close")

    def _kill(self) -> None:
        """It ends everything when its input is closed."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read()[-_SHOWN:].decode(errors="replace")

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None
