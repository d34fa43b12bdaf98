"""The demo's workload, one per VM. Standard library only; all it knows of Caesura is the HTTP API.

It counts, keeps a block of memory whose digest it checks after every gap, polls its metadata service once a
second for scheduled events, and approves those that name it: what an application on a real cloud does.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import mmap
import os
import random
import time
import urllib.parse

_TICK_S = 0.05
_POLL_S = 1.0
_GAP_S = 0.5
"""s: a longer silence between two ticks was a pause (or a very slow answer): memory is checked either way."""


class Workload:
    """The workload's state, written to its status file."""

    def __init__(self, vm: str, url: str, status: str, ram_path: str) -> None:
        self.vm = vm
        self.url = urllib.parse.urlsplit(url)
        self.status_path = status
        self.count = 0
        self.polls = 0
        self.poll_errors = 0
        self.approved: list[str] = []
        self.gaps: list[float] = []
        self.digest_checks = 0
        self.digests_ok = True
        self.block = random.Random(vm).randbytes(1 << 20)  # noqa: S311 - a pattern, no secret
        self.ram = _map_ram(ram_path, vm)
        self.digest = self.digest_now()

    def digest_now(self) -> str:
        """Digests of the private block and of the mapped memory file."""
        found = hashlib.blake2b(self.block)
        if self.ram is not None:
            found.update(self.ram[:])
        return found.hexdigest()

    def tick(self, gap_s: float) -> None:
        """Count; after a gap, check that memory is unchanged."""
        self.count += 1
        if gap_s > _GAP_S:
            self.gaps.append(round(gap_s, 3))
            self.digest_checks += 1
            self.digests_ok = self.digests_ok and self.digest_now() == self.digest
            self.write()

    def poll(self) -> None:
        """Poll for events, approve the scheduled ones that name this VM."""
        self.polls += 1
        try:
            document = json.loads(self._request("GET"))
            for event in document["Events"]:
                fresh = event["EventId"] not in self.approved
                if fresh and event["EventStatus"] == "Scheduled" and self.vm in event["Resources"]:
                    self._request("POST", json.dumps({"StartRequests": [{"EventId": event["EventId"]}]}))
                    self.approved.append(event["EventId"])
        except (OSError, ValueError, KeyError, http.client.HTTPException):
            self.poll_errors += 1  # polled again in a second, as with the real service

    def _request(self, method: str, body: str | None = None) -> bytes:
        connection = http.client.HTTPConnection(self.url.hostname or "", self.url.port, timeout=2)
        try:
            connection.request(method, f"{self.url.path}?{self.url.query}", body, {"Metadata": "true"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise http.client.HTTPException(f"{method} answered {answer.status}")
            return content
        finally:
            connection.close()

    def write(self) -> None:
        """Replace the status file in one step."""
        facts = {
            "vm": self.vm,
            "count": self.count,
            "polls": self.polls,
            "poll_errors": self.poll_errors,
            "approved": self.approved,
            "gaps_s": self.gaps,
            "digest_checks": self.digest_checks,
            "digests_ok": self.digests_ok,
        }
        with open(f"{self.status_path}.new", "w", encoding="utf-8") as file:  # noqa: PTH123 - start-up time
            json.dump(facts, file)
        os.replace(f"{self.status_path}.new", self.status_path)  # noqa: PTH105 - start-up time


def _map_ram(path: str, vm: str) -> mmap.mmap | None:
    if not path:
        return None
    with open(path, "r+b") as file:  # noqa: PTH123 - start-up time
        ram = mmap.mmap(file.fileno(), 0)
    ram[:] = random.Random(f"ram of {vm}").randbytes(len(ram))  # noqa: S311 - a pattern, no secret
    return ram


def main() -> None:
    """Work until killed."""
    environ = os.environ
    work = Workload(
        environ["CAESURA_DEMO_VM"],
        environ["CAESURA_DEMO_URL"],
        environ["CAESURA_DEMO_STATUS"],
        environ.get("CAESURA_VM_RAM", ""),
    )
    work.write()
    last = time.monotonic()
    # Not all workloads of the fleet at the same instant.
    next_poll = last + random.random() * _POLL_S  # noqa: S311 - spread, no secret
    while True:
        time.sleep(_TICK_S)
        now = time.monotonic()
        work.tick(now - last)
        last = now
        if now >= next_poll:
            next_poll = now + _POLL_S
            work.poll()
            work.write()


if __name__ == "__main__":
    main()
