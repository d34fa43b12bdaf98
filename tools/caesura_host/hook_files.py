"""The files that a prepared host gets: the initramfs hook and its script, the unit, the drop-ins.

They are in ``deploy`` of a checkout; the wheel has them beside this module.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

_BESIDE = Path(__file__).parent / "files"
_CHECKOUT = Path(__file__).parents[2] / "deploy"

SOURCES = {
    "/etc/initramfs-tools/hooks/caesura": "initramfs/hooks/caesura",
    "/etc/initramfs-tools/scripts/local-bottom/caesura": "initramfs/scripts/local-bottom/caesura",
    "/etc/systemd/system/caesura-arrive.service": "systemd/kexec/caesura-arrive.service",
    "/etc/systemd/system/caesura-pause-guard.service.d/kexec.conf": "systemd/kexec/caesura-pause-guard.conf",
    "/etc/systemd/system/caesura-host-updater.service.d/kexec.conf": "systemd/kexec/caesura-host-updater.conf",
}
"""Place on the host, and source below ``deploy``."""
EXECUTABLE = frozenset(
    ("/etc/initramfs-tools/hooks/caesura", "/etc/initramfs-tools/scripts/local-bottom/caesura")
)


def installed_texts() -> dict[str, str]:
    """Place on the host to text."""
    base = _BESIDE if _BESIDE.is_dir() else _CHECKOUT
    return {place: (base / source).read_text(encoding="utf-8") for place, source in SOURCES.items()}


def _version() -> str:
    texts = installed_texts()
    return sha256("".join(texts[place] for place in sorted(EXECUTABLE)).encode()).hexdigest()[:8]


HOOK_VERSION = _version()
"""Of the hook and its script, from their texts: a kernel whose initramfs has another one is refused."""
