"""``python -m caesura.runtime.probe http://127.0.0.1:9310/ready``: a health check where there is no curl.

Standard library only, since it is started every few seconds. Prints on one line what is wrong, for the log of health checks that
a container engine keeps.
"""

from __future__ import annotations

import http.client
import json
import sys
import urllib.parse
from collections.abc import Sequence

_ANSWER_S = 3.0
"""s: all pings of a service are answered from memory, so one that takes longer is not healthy."""


def main(argv: Sequence[str]) -> int:
    """Probe once. 0: ready; 1: not ready or no answer; 2: wrong usage."""
    connection = _connection(argv[0]) if len(argv) == 1 else None
    if connection is None:
        _say("usage: python -m caesura.runtime.probe http://HOST:PORT/ready")
        return 2
    try:
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        _say(f"no answer from {argv[0]}: {error}")
        return 1
    finally:
        connection.close()
    if answer.status == 200:
        return 0
    _say(f"{answer.status}: {_wrong(body)}")
    return 1


def _connection(address: str) -> http.client.HTTPConnection | None:
    """A connection with nothing sent yet; None if that is not an address."""
    try:
        url = urllib.parse.urlsplit(address)
        if url.scheme != "http" or not url.hostname:
            return None
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=_ANSWER_S)
        connection.putrequest("GET", url.path or "/")
    except (ValueError, http.client.InvalidURL):
        return None
    return connection


def _wrong(body: str) -> str:
    try:
        wrong = json.loads(body)["wrong"]
        return "; ".join(f"{name}: {why}" for name, why in wrong.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        return body.strip()[:200]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
