"""How a PostgreSQL is reached: the URL has no secret, a server on a network is checked, nothing waits without a limit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from caesura.runtime.command import run_service
from caesura.runtime.postgresql_options import PostgresOptions, advice
from caesura.runtime.settings import Secret
from caesura.runtime.shared_rows import WrongStore
from caesura_coordinator.settings import CoordinatorSettings
from caesura_coordinator.store_options import StoreSettingsError, check_store


def options(url: str, **changes: Any) -> PostgresOptions:
    return PostgresOptions(**{"url": url, "fleet": "default", "name": "c", "lease_s": 9.0, **changes})


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql://caesura:secret@db/caesura", "must not have password"),
        ("postgresql://caesura@db/caesura?password=secret", "must not have password"),
        ("postgresql://caesura@db/caesura?passfile=/x", "must not have passfile"),
        ("postgresql://caesura@db/caesura?service=other", "must not have service"),
        ("postgresql://caesura@db/", "names no database"),
        ("postgresql:///caesura", "names no host"),
        ("postgresql://caesura@db/caesura?nonsense=1", "cannot be read"),
        ("postgresql://caesura:secret%zz@db/caesura", "cannot be read"),
        ("postgresql://caesura:secret/more@db/caesura", "a port that is not a number"),
        ("postgresql://caesura:5/secret@db/caesura", "an @ in the name of the database"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_by_name(url: str, why: str) -> None:
    with pytest.raises(WrongStore, match=why) as refused:
        options(url)
    assert "secret" not in str(refused.value)


def test_the_password_is_not_in_what_is_shown() -> None:
    made = options("postgresql://caesura@db/caesura", password=Secret("correct horse"))
    assert "correct horse" not in repr(made) + made.label + str(made.parameters())
    assert made.label == "postgresql://db/caesura"


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("postgresql://caesura@db:5433/caesura", "postgresql://db:5433/caesura"),
        ("postgresql://caesura@a:5433,b/caesura", "postgresql://a:5433,b/caesura"),
        ("postgresql://caesura@a,b/caesura?port=5433", "postgresql://a:5433,b:5433/caesura"),
        ("postgresql://caesura@[::1]:5433/caesura", "postgresql://[::1]:5433/caesura"),
        (
            "postgresql://caesura@/caesura?host=/run/postgresql&port=5433",
            "postgresql:///run/postgresql:5433/caesura",
        ),
    ],
)
def test_what_people_read_tells_two_servers_of_one_machine_apart(url: str, label: str) -> None:
    assert options(url).label == label


@pytest.mark.parametrize(
    ("why", "advised"),
    [
        ('FATAL: password authentication failed for user "caesura"', "Is it the password of that role?"),
        ("fe_sendauth: no password supplied", "to the file with the password"),
    ],
)
def test_a_password_that_is_refused_names_the_setting(why: str, advised: str) -> None:
    said = advice(why)
    assert "CAESURA_COORDINATOR_STORE_PASSWORD_FILE" in said
    assert advised in said
    assert advice("Connection refused") == ""


@pytest.mark.parametrize(
    ("url", "ca_file", "expected"),
    [
        ("postgresql://caesura@db/caesura", "", ("verify-full", "system")),
        ("postgresql://caesura@db/caesura", "/ca.pem", ("verify-full", "/ca.pem")),
        ("postgresql://caesura@db-1,db-2/caesura", "", ("verify-full", "system")),
        ("postgresql://caesura@127.0.0.1,db/caesura", "", ("verify-full", "system")),
        ("postgresql://caesura@127.0.0.1/caesura", "", (None, None)),
        ("postgresql://caesura@127.0.0.1/caesura", "/ca.pem", ("verify-full", "/ca.pem")),
        ("postgresql://caesura@/caesura?host=/run/postgresql", "", (None, None)),
        ("postgresql://caesura@db/caesura?sslmode=require", "", ("require", None)),
    ],
)
def test_over_a_network_the_server_is_checked(url: str, ca_file: str, expected: tuple[Any, Any]) -> None:
    made = options(url, ca_file=ca_file).parameters()
    assert (made.get("sslmode"), made.get("sslrootcert")) == expected


def test_a_ca_file_that_would_not_be_used_is_refused() -> None:
    with pytest.raises(WrongStore, match="sslmode=disable"):
        options("postgresql://caesura@db/caesura?sslmode=disable", ca_file="/ca.pem")


def test_everything_has_a_time_limit_that_follows_from_the_lease() -> None:
    made = options("postgresql://caesura@db/caesura?options=-c%20work_mem%3D8MB").parameters()
    assert made["tcp_user_timeout"] == 9000
    assert made["connect_timeout"] <= 9
    assert made["keepalives_idle"] + made["keepalives_interval"] * made["keepalives_count"] <= 9
    for each in ("statement_timeout=9000", "idle_session_timeout=9000", "lock_timeout=9000", "work_mem=8MB"):
        assert each in made["options"]
    assert made["target_session_attrs"] == "read-write"


def test_all_hosts_are_tried_within_one_lease() -> None:
    for hosts, lease_s in (("a,b", 10.0), ("a,b,c", 10.0), ("a,b,c,d", 10.0), ("a,b", 5.0), ("a,b,c", 60.0)):
        made = options(f"postgresql://u@{hosts}/d", lease_s=lease_s).parameters()
        assert made["connect_timeout"] >= 2
        assert made["connect_timeout"] * len(hosts.split(",")) < lease_s
    options("postgresql://u@a/d", lease_s=1.0)
    with pytest.raises(WrongStore, match=r"a lease of 3 s is too short for the 2 hosts .* more than 4"):
        options("postgresql://u@a,b/d", lease_s=3.0)


def test_the_settings_are_checked_before_anything_starts() -> None:
    check_store(CoordinatorSettings(state_dir="/x"))
    check_store(CoordinatorSettings(state_dir="/x", store="postgresql://caesura@db/caesura"))
    with pytest.raises(StoreSettingsError, match=r"CAESURA_COORDINATOR_STORE: .* must not have password"):
        check_store(CoordinatorSettings(state_dir="/x", store="postgresql://caesura:y@db/caesura"))
    with pytest.raises(StoreSettingsError, match="are for a store in PostgreSQL"):
        check_store(CoordinatorSettings(state_dir="/x", store_ca_file="/ca.pem"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://caesura:s3cret@db/caesura",
        "postgresql://caesura:s3cret%zz@db/caesura",
        "postgresql://caesura:s3cret/x@db/caesura",
        "postgresql://caesura:x@s3cret@db/caesura",
        "postgresql://caesura@db/caesura?pass%77ord=s3cret",
        "mysql://caesura:s3cret@db/caesura",
    ],
)
@pytest.mark.parametrize("word", ["--print-config", "--check-config"])
def test_a_password_in_the_url_is_never_shown(
    url: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def never(_: CoordinatorSettings) -> None:
        raise AssertionError

    environ = {"CAESURA_COORDINATOR_STATE_DIR": "/x", "CAESURA_COORDINATOR_STORE": url}
    code = run_service(
        "coordinator", "s", CoordinatorSettings, never, checks=[check_store], argv=[word], environ=environ
    )
    said = "".join(capsys.readouterr())
    assert "s3cret" not in said
    assert code == (2 if word == "--check-config" or url.startswith("mysql") else 0)
    assert "db/caesura" in said or word == "--check-config"


def test_without_the_setting_nothing_of_it_is_imported() -> None:
    script = "import sys, caesura_coordinator.__main__; print([each for each in sys.modules if 'psycopg' in each or 'postgresql' in each])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
