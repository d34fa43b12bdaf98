"""The OpenAPI description of the control API, made from its types. Pure.

``python -m caesura_rehearse.control.openapi`` prints it; ``openapi.json`` is that, and a test holds it to be fresh.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from caesura_rehearse.control.call_dispatcher import EventStep, RolloutWait
from caesura_rehearse.results.observations import EventRecord, RolloutRecord
from caesura_rehearse.results.report import Report
from caesura_rehearse.simulation.orders import Order

_JSON = "application/json"


def description() -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    types = (Order, EventRecord, RolloutRecord, Report, EventStep, RolloutWait)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schemas["Problem"] = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}},
    }
    event_id = {
        "name": "event_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "format": "uuid"},
    }
    of_event = {
        f"/v1/events/{{event_id}}/{name}": {
            "parameters": [event_id],
            "post": {
                "operationId": name,
                "summary": summary,
                **({"requestBody": _content("EventStep")} if name == "wait" else {}),
                "responses": _responses("200", "EventRecord", *refused),
            },
        }
        for name, summary, refused in (
            ("cancel", "Take a scheduled event back; answers when it has vanished.", ("404",)),
            ("approve", "Approve a scheduled event in the place of its clients.", ("404",)),
            ("wait", "Wait until an event has reached a step.", ("404", "409")),
        )
    }
    rollout_id = {
        "name": "rollout_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "format": "uuid"},
    }
    of_rollout = {
        f"/v1/rollouts/{{rollout_id}}/{name}": {
            "parameters": [rollout_id],
            "post": {
                "operationId": f"{name}_rollout",
                "summary": summary,
                **({"requestBody": _content("RolloutWait")} if name == "wait" else {}),
                "responses": _responses("200", "RolloutRecord", *refused),
            },
        }
        for name, summary, refused in (
            ("cancel", "Take back what is scheduled; nothing of it follows.", ("404",)),
            ("wait", "Wait until it is over.", ("404", "409")),
        )
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "caesura rehearse",
            "version": "1",
            "description": "Orders for a rehearsal that runs. Address and token are in the file that `caesura rehearse` names at its start.",
        },
        "security": [{"token": []}],
        "paths": {
            "/v1/state": {
                "get": {
                    "operationId": "state",
                    "summary": "What was found so far.",
                    "responses": _responses("200", "Report"),
                }
            },
            "/v1/events": {
                "post": {
                    "operationId": "order",
                    "summary": "Announce an event; what follows happens in the background.",
                    "requestBody": _content("Order"),
                    "responses": _responses("201", "EventRecord"),
                }
            },
            **of_event,
            "/v1/rollouts": {
                "post": {
                    "operationId": "roll",
                    "summary": "Announce the events of the first update domain; the others follow one after the other.",
                    "requestBody": _content("Order"),
                    "responses": _responses("201", "RolloutRecord"),
                }
            },
            **of_rollout,
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _content(schema: str) -> dict[str, Any]:
    return {"content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


def _responses(good: str, schema: str, *refused: str) -> dict[str, Any]:
    why = {
        "400": "The request is not valid, or cannot be carried out.",
        "401": "The token is missing or wrong.",
        "404": "There is no such open event.",
        "409": "The step was not reached in time, or never will be.",
    }
    return {
        good: {"description": "Done.", **_content(schema)},
        **{
            code: {"description": why[code], **_content("Problem")}
            for code in sorted({"400", "401", *refused})
        },
    }


def text() -> str:
    """The file's text."""
    return json.dumps(description(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(text(), end="")  # noqa: T201 - what it is for
