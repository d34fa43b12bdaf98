"""Images under the upstream tags, made from Debian's packages where no registry can be reached.

They are stand-ins: the same names, users, folders and entry points as far as ``docker-compose.yml`` and the
Dockerfile rely on them, Debian's programs inside. There is none for Grafana, which Debian does not have.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from hashlib import blake2b
from pathlib import Path

from caesura_testing.containers import CannotRun, Engine

BASE = "caesura-stand-in:base"
PYTHON = "python:3.11.11-slim-bookworm"
BROKER = "eclipse-mosquitto:2.0.20"
PROMETHEUS = "prom/prometheus:v2.53.3"
DATABASE = "postgres:15.14-bookworm"
WITHOUT_STAND_IN = ("grafana",)

_SUITE = "bookworm"
_NEWER = "trixie"
"""It has the versions of compose and Prometheus that bookworm does not have; both need libc6 only."""
_NEWER_PACKAGES = ("docker-compose", "prometheus", "promtool")
_PACKAGES = ("python3", "python3-venv", "python3-pip", "ca-certificates", "mosquitto", "mosquitto-clients")
_RECIPES = {
    PYTHON: r"""
        RUN ln -s /usr/bin/python3 /usr/local/bin/python && ln -s /usr/bin/python3 /usr/local/bin/python3 && \
            rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
        COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
        ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
        CMD ["python3"]
    """,
    BROKER: r"""
        RUN groupadd --gid 1883 mqtt && useradd --no-create-home --uid 1883 --gid 1883 --home-dir /nonexistent mqtt && \
            install -d -o 1883 -g 1883 /mosquitto/config /mosquitto/data /mosquitto/log && \
            ln -s /usr/sbin/mosquitto /usr/bin/mosquitto
        VOLUME ["/mosquitto/data", "/mosquitto/log"]
        CMD ["/usr/sbin/mosquitto", "-c", "/mosquitto/config/mosquitto.conf"]
    """,
    PROMETHEUS: r"""
        COPY prometheus promtool /bin/
        RUN install -d -o 65534 -g 65534 /prometheus /etc/prometheus
        USER 65534
        VOLUME ["/prometheus"]
        WORKDIR /prometheus
        ENTRYPOINT ["/bin/prometheus"]
        CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
    """,
}
_DATABASE_PACKAGE = "postgresql-15"
_NOT_NEEDED = ("libc6", "libc-bin", "libllvm", "libperl", "libz3", "locales", "perl")
"""Packages that the database's depends on, and that are in the base or of no use there, by the beginnings of their names."""
_DATABASE_FILES = ("lib/postgresql", "lib/x86_64-linux-gnu", "share/postgresql", "share/zoneinfo")
# 3777, as in the image: an engine may give a tmpfs the mode of the folder that is below it.
_DATABASE_RECIPE = r"""
    COPY usr /usr
    COPY entrypoint /usr/local/bin/docker-entrypoint.sh
    RUN ldconfig && groupadd -o --gid 999 postgres && \
        useradd -o --no-create-home --uid 999 --gid 999 --home-dir /var/lib/postgresql postgres && \
        install -d -m 3777 -o 999 -g 999 /var/run/postgresql && \
        install -d -o 999 -g 999 /var/lib/postgresql && install -d -m 700 -o 999 -g 999 /var/lib/postgresql/data
    ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 PGDATA=/var/lib/postgresql/data
    VOLUME ["/var/lib/postgresql/data"]
    STOPSIGNAL SIGINT
    ENTRYPOINT ["docker-entrypoint.sh"]
    CMD ["postgres"]
"""
_DATABASE_ENTRYPOINT = r"""#!/bin/sh
# As much of the image's own entry point as docker-compose.yml relies on.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  # shellcheck disable=SC2086 # several words
  initdb -D "$PGDATA" --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" ${POSTGRES_INITDB_ARGS:-}
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  echo "CREATE DATABASE \"$POSTGRES_DB\"" | postgres --single -D "$PGDATA" postgres
fi
exec "$@" -c listen_addresses='*'
"""


def compose_plugin(cache: Path) -> Path:
    """The compose plugin's program, fetched from Debian once.

    Raises:
        CannotRun: it cannot be had.
    """
    return _fetched(cache) / "docker-compose"


def build_stand_ins(engine: Engine, cache: Path) -> None:
    """Make the images that are not there or not of this recipe, from Debian's mirror once, then from the cache.

    Raises:
        CannotRun: packages cannot be had.
    """
    label = _label(_SUITE, _PACKAGES, _RECIPES)
    have = _labelled(engine, label)
    if not set(_RECIPES) <= have:
        _build_from_base(engine, cache, label, with_base=BASE not in have)
    of_database = _label(
        label, _DATABASE_PACKAGE, _NOT_NEEDED, _DATABASE_FILES, _DATABASE_RECIPE, _DATABASE_ENTRYPOINT
    )
    if DATABASE not in _labelled(engine, of_database):
        _build_database(engine, cache, of_database)


def _label(*parts: object) -> str:
    return f"org.caesura.stand-in={blake2b(repr(parts).encode(), digest_size=8).hexdigest()}"


def _labelled(engine: Engine, label: str) -> set[str]:
    """The images with this label."""
    said = engine.run("images", "--filter", f"label={label}", "--format", "{{.Repository}}:{{.Tag}}").out
    return set(said.split())


def _build_from_base(engine: Engine, cache: Path, label: str, *, with_base: bool) -> None:
    programs = _fetched(cache)
    with tempfile.TemporaryDirectory(prefix="caesura-stand-in-", dir=cache) as name:
        folder = Path(name)
        if with_base:
            _import_base(engine, folder, label)
        for program in ("prometheus", "promtool"):
            shutil.copy2(programs / program, folder / program)
        # A machine behind a proxy of its own trusts more than Debian does.
        shutil.copy2("/etc/ssl/certs/ca-certificates.crt", folder / "ca-certificates.crt")
        for tag, recipe in _RECIPES.items():
            _build(engine, folder, tag, recipe, label)


def _build(engine: Engine, folder: Path, tag: str, recipe: str, label: str) -> None:
    (folder / "Dockerfile").write_text(f"FROM {BASE}\n{recipe}\n", encoding="utf-8")
    # The classic builder: BuildKit would need the plugin buildx, and these recipes do not need BuildKit.
    classic = {"DOCKER_BUILDKIT": "0"}
    engine.run("build", "--quiet", "--label", label, "-t", tag, ".", cwd=folder, environ=classic)


def _build_database(engine: Engine, cache: Path, label: str) -> None:
    """PostgreSQL's files as its packages have them: an installation would make a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="caesura-stand-in-", dir=cache) as name:
        folder = Path(name)
        unpacked = folder / "packages"
        apt = _apt(folder / "apt", _SUITE)
        _do(*apt, "--yes", "--no-install-recommends", "--download-only", "install", _DATABASE_PACKAGE)
        for package in (folder / "apt" / "cache" / "archives").glob("*.deb"):
            if not package.name.startswith(_NOT_NEEDED):
                _do("dpkg-deb", "-x", str(package), str(unpacked))
        context = folder / "context"
        for each in _DATABASE_FILES:
            for place in (
                unpacked / each,
                unpacked / "usr" / each,
            ):  # the first of what is older than /usr for all
                if place.is_dir():
                    # Without LLVM there is no compilation of queries.
                    without = shutil.ignore_patterns("bitcode", "llvmjit*")
                    shutil.copytree(
                        place, context / "usr" / each, symlinks=True, ignore=without, dirs_exist_ok=True
                    )
        (context / "entrypoint").write_text(_DATABASE_ENTRYPOINT, encoding="utf-8")
        (context / "entrypoint").chmod(0o755)
        _build(engine, context, DATABASE, _DATABASE_RECIPE, label)


def _import_base(engine: Engine, folder: Path, label: str) -> None:
    root = folder / "rootfs"
    _do(
        "debootstrap",
        "--variant=minbase",
        f"--include={','.join(_PACKAGES)}",
        _SUITE,
        str(root),
        debian_mirror(),
    )
    shutil.rmtree(root / "var" / "cache" / "apt", ignore_errors=True)
    shutil.rmtree(root / "var" / "lib" / "apt" / "lists", ignore_errors=True)
    archive = folder / "rootfs.tar"
    _do("tar", "-C", str(root), "--one-file-system", "-cf", str(archive), ".")
    shutil.rmtree(root)
    engine.run("import", "--change", f"LABEL {label}", str(archive), BASE)
    archive.unlink()


def _fetched(cache: Path) -> Path:
    """Programs of the newer Debian, without installing anything."""
    place = cache / f"{_NEWER}-programs"
    if place.is_dir():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as name:
        folder = Path(name)
        for each in ("programs", "unpacked"):
            (folder / each).mkdir()
        apt = _apt(folder / "apt", _NEWER)
        _do(*apt, "download", *(f"{each}/{_NEWER}" for each in _NEWER_PACKAGES), cwd=folder)
        for package in folder.glob("*.deb"):
            _do("dpkg-deb", "-x", str(package), str(folder / "unpacked"))
        for path in (
            "usr/libexec/docker/cli-plugins/docker-compose",
            "usr/bin/prometheus",
            "usr/bin/promtool",
        ):
            shutil.copy2(folder / "unpacked" / path, folder / "programs")
        (folder / "programs").rename(place)
    return place


def _apt(folder: Path, suite: str) -> list[str]:
    """apt-get for another suite, or for a machine that has no package; nothing of this machine is read or changed. Its lists are fetched."""
    for each in ("lists/partial", "cache/archives/partial"):
        (folder / each).mkdir(parents=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source = f"deb [signed-by={keyring}] {debian_mirror()} {suite} main\n"
    (folder / "sources.list").write_text(source, encoding="utf-8")
    (folder / "status").touch()
    options = [
        f"Dir::Etc::sourcelist={folder}/sources.list",
        "Dir::Etc::sourceparts=-",
        f"Dir::State::lists={folder}/lists",
        f"Dir::State::status={folder}/status",
        f"Dir::Cache={folder}/cache",
        "APT::Sandbox::User=root",
    ]
    apt = ["apt-get", "-qq", *(word for each in options for word in ("-o", each))]
    _do(*apt, "update")
    return apt


def debian_mirror() -> str:
    """The mirror that this machine's own apt uses.

    Raises:
        CannotRun: it names none.
    """
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for path in places:
        if path.is_file():
            for address in addresses(path.read_text(encoding="utf-8", errors="replace")):
                if address.rstrip("/").endswith("/debian"):
                    return address
    raise CannotRun("no Debian mirror in /etc/apt/sources.list*")


def addresses(text: str) -> list[str]:
    """The addresses in a file of apt's sources, in either of its formats (sources.list(5)). Pure."""
    found = re.findall(r"^(?:deb[ \t]+(?:\[[^]]*\][ \t]+)?(\S+)|URIs:[ \t]*(\S+))", text, re.MULTILINE)
    return [one or other for one, other in found]


def _do(*words: str, cwd: Path | None = None) -> None:
    environ = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    done = subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = f"{done.stdout[-1000:]}\n{done.stderr[-1000:]}"
        raise CannotRun(f"{words[0]} ended with {done.returncode}:\n{said}")
