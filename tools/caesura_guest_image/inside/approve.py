"""Polls the scheduled-events API and approves the events that name this VM, as an application on a cloud does.

``caesura.url``: the whole address, ``http://10.0.2.2:8080/metadata/scheduledevents?api-version=2020-07-01``.
Port ``org.caesura.approve.0``: ``status``. The VM's name is CAESURA_VM_AGENT_VM.
"""

from __future__ import annotations

import json
import os
import socket
import time

from .parameters import Parameters
from .ports import RequestPort

PORT = "org.caesura.approve.0"
_POLL_S = 1.0


class Approver:
    """The events seen and approved. HTTP/1.0 by hand: http.client takes a second to import under TCG."""

    def __init__(self, vm: str, url: str) -> None:
        rest = url.removeprefix("http://")
        where, _, path = rest.partition("/")
        host, _, port = where.partition(":")
        self._address, self._host, self._path = (host, int(port or 80)), where, f"/{path}"
        self._vm = vm
        self.polls = self.errors = 0
        self.approved: list[str] = []
        self.last_error = ""

    def poll(self) -> None:
        """Poll; approve the events scheduled for this VM."""
        self.polls += 1
        try:
            for event in json.loads(self._request("GET"))["Events"]:
                fresh = event["EventId"] not in self.approved
                if fresh and event["EventStatus"] == "Scheduled" and self._vm in event["Resources"]:
                    self._request("POST", json.dumps({"StartRequests": [{"EventId": event["EventId"]}]}))
                    self.approved.append(event["EventId"])
        except (OSError, ValueError, KeyError) as error:
            self.errors += 1  # polled again in a second
            self.last_error = f"{type(error).__name__}: {error}"

    def _request(self, method: str, body: str = "") -> bytes:
        head = f"{method} {self._path} HTTP/1.0\r\nHost: {self._host}\r\nMetadata: true\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(self._address, timeout=2) as connection:
            connection.sendall(f"{head}\r\n{body}".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        first, _, rest = answer.partition(b"\r\n")
        if first.split(b" ")[1:2] != [b"200"]:
            raise ValueError(f"{method} answered {first.decode(errors='replace')}")
        return rest.partition(b"\r\n\r\n")[2]

    def status(self) -> bytes:
        """One JSON line."""
        return json.dumps(
            {
                "polls": self.polls,
                "errors": self.errors,
                "approved": self.approved,
                "last_error": self.last_error,
            }
        ).encode()


def run(parameters: Parameters) -> None:
    """Poll and answer indefinitely."""
    approver = Approver(os.environ.get("CAESURA_VM_AGENT_VM", ""), parameters["url"])
    requests = RequestPort(PORT, {b"status": approver.status})
    while True:
        approver.poll()
        requests.serve_until(time.monotonic() + _POLL_S)
