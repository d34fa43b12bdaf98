"""``caesura rehearse record``: what a Scheduled Events server serves, into a file that ``--replay`` serves again."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import click
import msgspec

from caesura.runtime.errors import CaesuraError
from caesura.runtime.visible import visible
from caesura_ctl.durations import DURATION
from caesura_ctl.errors import fail
from caesura_ctl.options import print_json

_LEAST_EVERY_S = 0.2  # s: the real server refuses more than five requests a second

_EPILOG = """\b
examples:
  caesura rehearse record http://169.254.169.254 events.jsonl
  caesura rehearse record http://127.0.0.1:8101 events.jsonl --for 20m --every 5s
  caesura rehearse --replay events.jsonl -- ./serve

\b
exit codes:
  0  recorded, also when Ctrl-C or SIGTERM ended it
  1  the file has reached 64 MiB; it can be replayed
  2  bad usage: also a server without documents, and a file that exists"""


@click.command("record", epilog=_EPILOG)
@click.argument("url")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--for", "for_s", type=DURATION, help="End after so long; else Ctrl-C does.")
@click.option(
    "--every",
    type=DURATION,
    default=1.0,
    show_default="1s",
    help="Time between two requests; at least 0.2s.",
)
@click.option("--overwrite", is_flag=True, help="FILE may exist, and is lost.")
@click.option("--json", "as_json", is_flag=True, help="Print what was recorded as JSON.")
def record(
    *, url: str, file: Path, for_s: float | None, every: float, overwrite: bool, as_json: bool
) -> None:
    """Record the documents that a Scheduled Events server at URL serves, with their times, into FILE.

    Any server of the API: a VM's own (run it there), a mock, Caesura's. It is only read. Each change is a line of JSON.
    """
    if every < _LEAST_EVERY_S:
        raise click.UsageError(
            "--every must be 0.2s at least: the real server refuses more than five requests a second"
        )
    try:
        recorded = asyncio.run(_record(url, file, for_s, every, overwrite=overwrite))
    except CaesuraError as error:
        fail(error, as_json=as_json)
    if as_json:
        print_json(msgspec.to_builtins(recorded))
    else:
        _say(
            f"recorded  {recorded.seconds:.0f} s in {recorded.file}, {recorded.size_bytes} bytes; documents: {recorded.documents}, "
            f"events: {recorded.events}"
        )


async def _record(url: str, file: Path, for_s: float | None, every: float, *, overwrite: bool) -> Any:
    from caesura_rehearse.recordings.recorder import Recorder, Server, check_free  # noqa: PLC0415 - --help does not need it

    check_free(file, overwrite=overwrite)
    recorder = Recorder(Server(url), file, every, _say, overwrite=overwrite)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, recorder.stop)
    _say(
        f"asking    {url} every {every:g} s; the real server takes up to two minutes for its first answer. Ctrl-C ends it"
    )
    return await recorder.run(for_s)


def _say(text: str) -> None:
    click.echo(visible(text), err=True)
