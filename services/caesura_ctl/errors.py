"""How a command of ``caesura`` fails: each error with its exit code, and its name in the document of ``--json``."""

from __future__ import annotations

from caesura.runtime.errors import CaesuraError


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
