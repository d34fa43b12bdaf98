"""Asks a service on this host what it says of itself at ``/ready``. Blocking."""

from __future__ import annotations

import http.client
import json
import socket

from caesura.runtime.listen import parse_listen


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask_ready(listen: str, timeout_s: float) -> dict[str, str]:
    """What is wrong, by the names of the service's pings; nothing: it is ready.

    Args:
        listen: its health listener, as in its settings.

    Raises:
        OSError: it does not answer.
    """
    place = parse_listen(listen)
    connection = (
        _UnixConnection(place, timeout_s)
        if isinstance(place, str)
        else http.client.HTTPConnection(*place, timeout=timeout_s)
    )
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        body = answer.read(1 << 20)
    except http.client.HTTPException as error:
        raise OSError(f"what listens there does not speak HTTP: {error!r}") from error
    finally:
        connection.close()
    if answer.status == 200:
        return {}
    try:
        wrong = json.loads(body)["wrong"]
        return {str(name): str(why) for name, why in wrong.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"ready": f"it answers {answer.status}"}
