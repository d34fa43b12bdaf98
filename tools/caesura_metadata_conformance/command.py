"""The command ``caesura conformance``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich.console import Console
from rich.markup import escape

from caesura.runtime.errors import CaesuraError
from caesura_ctl.durations import DURATION
from caesura_ctl.errors import fail
from caesura_ctl.options import print_json
from caesura_metadata_conformance.exchange import Ask, HttpTransport, NoAnswer, Reply
from caesura_metadata_conformance.probe import Probe
from caesura_metadata_conformance.rule import RuleResult
from caesura_metadata_conformance.run import BOOKS, check_server, count

_EPILOG = """\b
examples:
  caesura conformance http://127.0.0.1:8101
  caesura conformance http://127.0.0.1:8101 --watch 60s --approve --verbose
  caesura conformance unix:/run/vm.sock --only E --json

\b
exit codes:
  0  no rule fails
  1  a rule fails, or there is no server
  2  bad usage
  130  interrupted"""

_MARKS = {"passes": "[green]passes[/]", "fails": "[red]fails[/]", "cannot tell": "[yellow]cannot tell[/]"}
_SHOWN_BYTES = 2000  # of a body, with --verbose


class NoServer(CaesuraError):
    """Nothing answers at the address."""


@click.command(epilog=_EPILOG)
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Every check with its requests and answers, as JSON.")
@click.option("--verbose", is_flag=True, help="Show request and answer of every check that does not pass.")
@click.option(
    "--watch",
    type=DURATION,
    default=0.0,
    show_default="0s",
    help="How long documents are looked at: what happens to events in them is checked.",
)
@click.option(
    "--approve",
    is_flag=True,
    help="Approve an open event, if there is one. Without it no check changes anything.",
)
@click.option(
    "--only", multiple=True, metavar="NUMBER", help="Check only rules whose number begins so; repeatable."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=DURATION,
    default=10.0,
    show_default="10s",
    help="How long one answer may take.",
)
def conformance(
    url: str,
    *,
    as_json: bool,
    verbose: bool,
    watch: float,
    approve: bool,
    only: tuple[str, ...],
    timeout_s: float,
) -> None:
    """Check a server of Azure's instance metadata and scheduled events: any server, Caesura's or another.

    URL is http://host:port, or unix:/path. Each rule passes, fails, or cannot be judged.
    """
    numbers = [rule.number for book in BOOKS for rule in book.rules]
    for each in only:
        if not any(number.startswith(each.upper()) for number in numbers):
            raise click.BadParameter(f"no rule has a number that begins with {each!r}", param_hint="--only")
    try:
        transport = HttpTransport(url, timeout_s)
        probe = Probe(transport, watch_s=watch, approve=approve)
        try:
            probe.send(Ask(target="/metadata/versions", headers=(("Metadata", "true"),)))
        except NoAnswer as error:
            raise NoServer(f"no metadata server at {url}: {error}") from error
        results = check_server(probe, only)
    except CaesuraError as error:
        fail(error, as_json=as_json)
    passed, failed, unknown = count(results)
    if as_json:
        print_json(
            {
                "url": url,
                "passes": passed,
                "fails": failed,
                "cannot_tell": unknown,
                "rules": [_as_json(each) for each in results],
            }
        )
    else:
        _show(results, verbose=verbose)
    sys.exit(1 if failed else 0)


def _show(results: Sequence[RuleResult], *, verbose: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    titles = {book.letter: book.about for book in BOOKS}
    letter = ""
    for each in results:
        if each.number[0] != letter:
            letter = each.number[0]
            console.print(f"\n[bold]{titles[letter]}[/]")
        why = f"  [dim]{escape(each.why)}[/]" if each.why else ""
        console.print(f"  {each.number}  {_MARKS[each.verdict]}  {escape(each.title)}{why}")
        if verbose and each.verdict != "passes":
            for ask, reply in each.exchanges:
                console.print(escape(_shown(ask, reply)), style="dim")
    passed, failed, unknown = count(results)
    console.print(f"\n{len(results)} rules: {passed} pass, {failed} fail, {unknown} cannot be judged")


def _shown(ask: Ask, reply: Reply | None) -> str:
    """An exchange for people: > what was sent, < what came."""
    lines = [f"> {each}" for each in ask.encode("HOST").decode(errors="replace").splitlines() if each]
    if reply is None:
        lines.append("< no answer")
    else:
        lines.append(f"< {reply.status}")
        lines += [f"< {name}: {value}" for name, value in reply.headers.items()]
        lines += [f"< {each}" for each in reply.text[:_SHOWN_BYTES].splitlines()]
    return "\n".join(f"       {each}" for each in lines)


def _as_json(result: RuleResult) -> dict[str, object]:
    return {
        "number": result.number,
        "title": result.title,
        "source": result.source,
        "verdict": result.verdict,
        "why": result.why,
        "exchanges": [
            {
                "request": ask.encode("HOST").decode(errors="replace"),
                "answer": None
                if reply is None
                else {"status": reply.status, "headers": dict(reply.headers), "body": reply.text},
            }
            for ask, reply in result.exchanges
        ],
    }
