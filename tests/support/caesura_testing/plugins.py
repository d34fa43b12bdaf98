"""Installs a driver for a test, as a package manager would: a distribution on the path with one entry point."""

from __future__ import annotations

from pathlib import Path

from caesura_host_updater.drivers.plugin import GROUP


def install_driver(folder: Path, name: str, target: str, *, package: str = "") -> Path:
    """Make ``folder`` one that holds a distribution with a driver; put it on the path (``sys.path``, PYTHONPATH) afterwards.

    Args:
        folder: is made if it is not there.
        name: of the driver.
        target: ``module:Class``.
        package: the distribution's name; empty: ``caesura-driver-<name>``.
    """
    package = package or f"caesura-driver-{name}"
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {target}\n")
    return folder
