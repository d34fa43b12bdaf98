"""Structured logs: console on a terminal, one JSON object a line otherwise. Event names are short and dotted.

Logging never waits for the reader of the log: a standard error that is a full pipe would block an event loop, and with
it the resume of paused VMs. So lines go through a bounded queue to a thread that writes them. Lines that do not fit are
dropped and counted, and the next line written is preceded by the count.
"""

from __future__ import annotations

import atexit
import io
import logging
import logging.handlers
import os
import queue
import sys
from contextlib import suppress
from typing import Any, Literal

# structlog imports rich where it is installed, for tracebacks that are never shown here: a third of the time that a
# service needs to start, a tenth of the command's, and megabytes of each agent. A module that is None cannot be imported.
_rich = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment]
try:
    import structlog
finally:
    if _rich is None:
        del sys.modules["rich"]
    else:  # the command's tables are made with it
        sys.modules["rich"] = _rich

_QUEUED = 2000  # lines, some 300 bytes each: as many as a minute of trouble logs
_FLUSH_S = 1.0  # s: at the end of the process; a working reader takes all of it within milliseconds


def get_logger(name: str) -> Any:
    """A structlog logger of this name: its methods take an event and key-value pairs."""
    return structlog.get_logger(name)


def silence() -> None:
    """Log nothing: for a command whose output another program reads."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


class _Writer(logging.Handler):
    """Writes to a descriptor, without the locks of ``sys.stderr``: Python aborts if a thread holds them at exit."""

    def __init__(self, out: int | io.TextIOBase) -> None:
        super().__init__()
        self._out = out

    def createLock(self) -> None:  # noqa: N802 - as logging calls it
        """No lock: one thread writes, and at exit the logging module would wait for the lock during a write."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; if the other end is closed, it is discarded."""
        with suppress(OSError, ValueError):
            if not isinstance(self._out, int):
                self._out.write(f"{record.getMessage()}\n")
                self._out.flush()
                return
            left = f"{record.getMessage()}\n".encode(errors="replace")
            while left:
                left = left[os.write(self._out, left) :]


class NonBlockingHandler(logging.handlers.QueueHandler):
    """Formats a record and hands it to a thread that writes; see the module.

    Args:
        out: a file descriptor, or a text stream.
        room: the most lines that wait.
    """

    def __init__(self, out: int | io.TextIOBase, *, room: int = _QUEUED) -> None:
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(room)
        super().__init__(self._lines)
        self.dropped = 0
        """Lines that did not fit, since the start."""
        self._listener = _Listener(self, self._lines, _Writer(out))
        self._listener.start()

    def enqueue(self, record: logging.LogRecord) -> None:
        """Enqueue it, or drop it."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, ARG002 - as logging calls it
        """A line that cannot be formatted is dropped: the default would write to standard error, and wait."""
        self.dropped += 1

    def flush(self, timeout_s: float = _FLUSH_S) -> None:
        """Wait until everything is written, for ``timeout_s`` seconds at most."""
        done = self._lines.all_tasks_done
        with done:
            done.wait_for(lambda: not self._lines.unfinished_tasks, timeout_s)


class _Listener(logging.handlers.QueueListener):
    """The thread that writes. A daemon thread: it may be in a write that never returns."""

    def __init__(
        self, source: NonBlockingHandler, lines: queue.Queue[logging.LogRecord], writer: _Writer
    ) -> None:
        super().__init__(lines, writer)
        self._source = source
        self._writer = writer
        self._counted = 0

    def handle(self, record: logging.LogRecord) -> None:
        """Write it, preceded by the number of missing lines."""
        dropped, self._counted = self._source.dropped - self._counted, self._source.dropped
        if dropped:
            note = logging.LogRecord(
                "caesura.logs",
                logging.WARNING,
                "",
                0,
                "log.dropped: %d lines, since standard error did not take them",
                (dropped,),
                None,
            )
            self._writer.handle(self._source.prepare(note))
        super().handle(record)


_running: NonBlockingHandler | None = None


@atexit.register
def flush_logs() -> None:
    """Wait until what was logged is written, for a second at most."""
    if _running is not None:
        _running.flush()


def _stderr() -> int | io.TextIOBase:
    with suppress(OSError, ValueError):
        # A duplicate of our own: if the original is closed, its number is soon reused, and a late line would go to another file.
        return os.dup(sys.stderr.fileno())
    return sys.stderr  # type: ignore[return-value]  # a replacement by a test


def configure_logging(
    service: str, *, style: Literal["auto", "console", "json"] = "auto", level: str = "info"
) -> None:
    """Set up structlog and route the standard library's loggers through it, to stderr.

    Call once, from ``__main__``. ``service`` is bound to every line.
    """
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    # Without local variables, on a console too, where structlog's default shows them: they are long, and some are passwords.
    in_full = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if console
        else structlog.processors.JSONRenderer()
    )
    tail: list[structlog.typing.Processor] = [] if console else [in_full]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    global _running  # noqa: PLW0603 - logging itself is global
    if _running is not None:
        _running.flush()
    _running = handler = NonBlockingHandler(_stderr())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(service=service)
