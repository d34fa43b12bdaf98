"""``caesura doctor --measure`` without a guest: what is missing, and what figures say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from caesura_doctor import measure_checks
from caesura_doctor.command import doctor
from caesura_doctor.figures import Figures, MeasuredMethod, PauseSample, figures_of, findings_of, table_of
from caesura_doctor.kernel_memory import available_bytes
from caesura_doctor.measure_checks import look_for_needs
from caesura_host_updater.drivers.diagnosis import Diagnosis

_HELP = """Supported machines are:
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)
q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)
pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)
"""


def sample(method: MeasuredMethod, pause_s: float, **changes: Any) -> PauseSample:
    plain = PauseSample(
        method=method,
        pause_s=pause_s,
        clock_before_s=-0.02,
        clock_after_s=0.0002,
        clock_took_s=0.1,
        memory_equal=True,
    )
    return msgspec.structs.replace(plain, **changes)


def figures(*samples: PauseSample) -> Figures:
    return Figures(
        qemu="7.2.22",
        accelerator="tcg",
        accelerator_reason="as --accel says",
        memory_mib=256,
        boot_s=5.0,
        pattern_bytes=100 << 20,
        pauses=len(samples),
        pauses_unharmed=sum(each.memory_equal for each in samples),
        methods=figures_of(samples),
    )


def test_medians_and_ratios_are_of_one_measurement() -> None:
    found = figures_of(
        [
            *(sample("swap", each) for each in (0.010, 0.012, 0.900)),
            *(sample("freeze", each) for each in (0.002, 0.004, 0.003)),
        ]
    )
    assert [each.method for each in found] == ["freeze", "swap"]
    assert found[1].pause_median_s == 0.012
    assert (found[1].pause_least_s, found[1].pause_most_s) == (0.010, 0.900)
    assert found[1].ratio == pytest.approx(4.0)
    assert found[0].ratio == 1.0
    assert found[0].clock_before_median_s == 0.02, "how far off, whichever way"


def test_memory_that_was_harmed_is_wrong_and_a_clock_that_is_off_a_warning() -> None:
    """The latter may be the load of the moment."""
    well = findings_of(figures(sample("freeze", 0.002), sample("swap", 0.01)))
    assert {each.level for each in well} == {"ok"}
    bad = findings_of(
        figures(sample("freeze", 0.002, clock_after_s=0.05), sample("swap", 0.01, memory_equal=False))
    )
    assert {each.name: each.level for each in bad} == {"measure.memory": "wrong", "measure.clock": "warning"}
    assert all(each.remedy for each in bad)
    assert "harmed after 1" in bad[0].about


def test_the_table_has_a_row_for_each_method() -> None:
    lines = table_of(figures(sample("freeze", 0.002), sample("swap", 0.01), sample("replace", 0.1204)))
    assert [line.split()[0] for line in lines[2:]] == ["freeze", "swap", "replace"]
    assert "120 ms" in lines[4]
    assert "5 x" in lines[3]
    assert len({len(line) for line in lines[1:]}) == 1, "columns are aligned"


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    """Something that answers as QEMU does."""
    program = tmp_path / "qemu"
    program.write_text(
        f"""#!/bin/sh
case $1 in
--version) echo 'QEMU emulator version 7.2.22 (Debian 1:7.2)';;
-machine) cat <<'END'
{_HELP}END
esac
"""
    )
    program.chmod(0o755)
    return program


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A folder as `caesura guest build --output` leaves it."""
    folder = tmp_path / "guest"
    folder.mkdir()
    facts = {
        "folder": "/elsewhere",
        "kernel": "/elsewhere/vmlinuz",
        "initrd": "/elsewhere/initrd",
        "kernel_version": "6.1.0",
        "kernel_bytes": 1,
        "initrd_bytes": 1,
        "unpacked_bytes": 1,
        "packages": [],
        "seconds": 1.0,
        "cached": False,
    }
    (folder / "manifest.json").write_text(json.dumps(facts))
    for name in ("vmlinuz", "initrd"):
        (folder / name).write_bytes(b"x")
    return folder


def needs(qemu: Path | str, guest: Path | None, memory_mib: int = 128) -> tuple[Any, dict[str, Diagnosis]]:
    found: list[Diagnosis] = []
    host = look_for_needs(str(qemu), memory_mib, guest, found.append)
    return host, {each.name: each for each in found}


def test_all_that_is_needed(qemu: Path, guest: Path) -> None:
    host, found = needs(qemu, guest)
    assert {each.level for each in found.values()} == {"ok"}
    assert (host.binary, host.version, host.machine) == (str(qemu), "7.2.22", "pc-q35-7.2")
    assert host.image.initrd == str(guest / "initrd"), "where it is now, not where it was built"


def test_everything_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    host, found = needs("no-qemu", tmp_path, memory_mib=65536)
    assert host is None
    assert {name for name, each in found.items() if each.level == "wrong"} == {
        "measure.qemu",
        "measure.room",
        "measure.guest",
    }
    assert "apt-get install qemu-system-x86" in found["measure.qemu"].remedy
    assert "--memory" in found["measure.room"].remedy
    assert "caesura guest build --output" in found["measure.guest"].remedy


def test_a_guest_that_was_not_built_yet(qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_checks, "default_cache", lambda: tmp_path / "none")
    host, found = needs(qemu, None)
    assert host is None
    assert "not built yet" in found["measure.guest"].about
    assert not (tmp_path / "none").exists(), "nothing is made"


def test_a_guest_of_which_a_file_is_missing(qemu: Path, guest: Path) -> None:
    (guest / "initrd").unlink()
    host, found = needs(qemu, guest)
    assert host is None
    assert "initrd cannot be read" in found["measure.guest"].about


@pytest.mark.parametrize("text", ["exit 1", "echo something else"])
def test_a_program_that_is_no_qemu(tmp_path: Path, guest: Path, text: str) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    host, found = needs(program, guest)
    assert host is None
    assert found["measure.qemu"].level == "wrong"


def test_how_much_memory_there_is(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       24689236 kB\nMemAvailable:   1024 kB\n")
    assert available_bytes(file) == 1 << 20
    file.write_text("MemTotal:       24689236 kB\n")
    with pytest.raises(OSError, match="no MemAvailable"):
        available_bytes(file)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--runs", "3"], "--runs is for --measure"),
        (["--measure", "--no-broker"], "--broker does nothing with --measure"),
        (["--measure", "--runs", "0"], "0 is not in the range"),
        (["--measure", "--memory", "64"], "64 is not in the range"),
        (["--measure", "--accel", "xen"], "'xen' is not one of"),
    ],
)
def test_bad_usage(words: list[str], why: str) -> None:
    done = CliRunner().invoke(doctor, words)
    assert done.exit_code == 2
    assert why in done.output


def test_what_is_missing_is_one_document(tmp_path: Path) -> None:
    words = ["--measure", "--qemu", "no-qemu", "--guest", str(tmp_path), "--json"]
    done = CliRunner().invoke(doctor, words)
    assert done.exit_code == 1
    answer = json.loads(done.stdout)
    assert answer["healthy"] is False
    assert "figures" not in answer
    assert {each["name"] for each in answer["findings"]} >= {"measure.qemu", "measure.guest"}


def test_the_example_of_a_machine_is_this_qemus() -> None:
    """As the installed one lists them, where there is one."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        pytest.skip("QEMU is not installed")
    found: list[Diagnosis] = []
    host = measure_checks._qemu(path, found.append)
    assert host is not None
    assert host[2].startswith("pc-q35-")
