"""``./demo`` and ``./check`` behind a proxy that inspects TLS: the system trusts its authority, uv's own roots do not."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from caesura_testing.broker import Certificates, make_certificates
from caesura_testing.patience import patient

ROOT = Path(__file__).resolve().parents[3]
SYSTEM = Path("/etc/ssl/certs/ca-certificates.crt")
ASK = """
cd "$1"
. deploy/bootstrap.sh
find_uv
exec "$UV" pip install --no-config --no-cache --python "$2" --target "$3" --default-index "$4" no-such-package
"""


class Index(BaseHTTPRequestHandler):
    """An index without any package."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def index(authority: Certificates) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.cert_file, authority.key_file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://localhost:{server.server_port}/simple"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(tmp_path: Path, index: str, *before: str, **environ: str) -> str:
    """What uv says about that index, found and started as ``./demo`` does it."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UV_", "SSL_", "PIP_", "REQUESTS_"))
    }
    words = [
        *before,
        "sh",
        "-ec",
        ASK,
        "sh",
        str(ROOT),
        str(ROOT / ".venv/bin/python"),
        str(tmp_path / "out"),
        index,
    ]
    told = subprocess.run(
        words, env=plain | environ, capture_output=True, text=True, timeout=patient(60), check=False
    )
    return told.stderr


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"])
def test_an_authority_that_pip_is_told_of_is_good_enough_for_uv(
    tmp_path: Path, index: str, authority: Certificates, variable: str
) -> None:
    assert "no-such-package was not found" in ask(tmp_path, index, **{variable: str(authority.ca_file)})


def test_an_authority_that_nobody_trusts_is_refused(tmp_path: Path, index: str) -> None:
    assert "certificate" in ask(tmp_path, index)


@pytest.mark.skipif(
    os.geteuid() != 0 or not SYSTEM.exists(), reason="needs root, and Debian's place for the roots"
)
def test_an_authority_of_the_system_is_good_enough_for_uv(
    tmp_path: Path, index: str, authority: Certificates
) -> None:
    roots = tmp_path / "roots.crt"
    shutil.copy(SYSTEM, roots)
    with roots.open("ab") as file:
        file.write(authority.ca_file.read_bytes())
    (tmp_path / "no-folder").mkdir()
    mount = f'mount --bind "{roots}" "{SYSTEM}"; exec "$@"'
    found = ask(tmp_path, index, "unshare", "--mount", "sh", "-ec", mount, "sh")
    assert "no-such-package was not found" in found


def test_bytecode_is_kept_for_the_next_process() -> None:
    """Containers for builds often forbid it; then each service, agent and test process would compile all that it imports."""
    kept = subprocess.run(
        ("sh", "-c", '. deploy/bootstrap.sh; printf %s "${PYTHONDONTWRITEBYTECODE-unset}"'),
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert kept == "unset"
