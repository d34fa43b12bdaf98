"""How a command of ``caesura`` fails: each error with its exit code, and its name in the document of ``--json``."""

from __future__ import annotations

import sys
from typing import NoReturn

import click
import msgspec

from caesura.runtime.errors import CaesuraError
from caesura.runtime.visible import visible, visible_json

EXIT_CODES = """exit codes:
  0  done, or the rollout completed
  1  the rollout halted, was aborted, or a rule did not hold
  2  bad usage or configuration
  3  refused: the plan or the request cannot be carried out
  4  the broker cannot be reached
  5  the coordinator does not answer
  130  interrupted (a rollout that was started continues)
  143  the same by SIGTERM"""


class NotCompleted(CaesuraError):
    """The followed rollout did not complete."""

    exit_code = 1


class BadRequest(CaesuraError):
    """A request that violates the contract, detected before it is sent."""

    exit_code = 2


class RefusedByCoordinator(CaesuraError):
    """The coordinator refused."""

    exit_code = 3


class NoBroker(CaesuraError):
    """The broker cannot be reached."""

    exit_code = 4


class NoCoordinatorAnswer(CaesuraError):
    """The coordinator did not answer in time."""

    exit_code = 5


class RequestInterrupted(CaesuraError):
    """A signal ended the command between a request and its answer."""

    exit_code = 130  # 143 if the signal was SIGTERM

    def __init__(self) -> None:
        super().__init__(
            "interrupted before the coordinator answered: the request may have been accepted. See caesura status."
        )


def json_name(error: CaesuraError) -> str:
    """The value of ``error`` in the document. It is published: it stays when a class is renamed."""
    match error:
        case RefusedByCoordinator():
            return "Refused"
        case NoCoordinatorAnswer():
            return "NoAnswer"
        case _:
            return type(error).__name__


def fail(error: CaesuraError, *, as_json: bool) -> None:
    """Print the error on standard error, and exit with its code."""
    if as_json:
        fail_json(json_name(error), str(error), error.exit_code)
    click.echo(f"caesura: {visible(str(error))}", err=True)
    sys.exit(error.exit_code)


def fail_json(error: str, reason: str, code: int) -> NoReturn:
    """Print the error as one JSON document on standard error, and exit."""
    line = msgspec.json.encode({"error": error, "reason": reason, "exit_code": code})
    click.echo(visible_json(line), err=True)
    sys.exit(code)
