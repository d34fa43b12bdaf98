"""Errors of the command: their published names."""

from __future__ import annotations

import pytest

from caesura.runtime.errors import CaesuraError
from caesura_ctl.errors import (
    BadRequest,
    NoBroker,
    NoCoordinatorAnswer,
    NotCompleted,
    RefusedByCoordinator,
    RequestInterrupted,
    json_name,
)


@pytest.mark.parametrize(
    ("error", "name", "code"),
    [
        (NotCompleted(""), "NotCompleted", 1),
        (BadRequest(""), "BadRequest", 2),
        (RefusedByCoordinator(""), "Refused", 3),
        (NoBroker(""), "NoBroker", 4),
        (NoCoordinatorAnswer(""), "NoAnswer", 5),
        (RequestInterrupted(), "RequestInterrupted", 130),
    ],
)
def test_the_names_that_scripts_know_stay(error: CaesuraError, name: str, code: int) -> None:
    assert (json_name(error), error.exit_code) == (name, code)
