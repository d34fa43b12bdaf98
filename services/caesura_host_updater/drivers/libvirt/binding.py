"""libvirt's Python binding: where it is found, and its event loop. Everything here blocks.

On PyPI it is a source package that needs libvirt's headers; distributions have it built, outside of a virtual environment. So
it is taken from a folder, and nothing else of that folder is.
"""

from __future__ import annotations

import importlib
import sys
import threading
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType

from caesura.runtime.errors import ConfigError
from caesura.runtime.logs import get_logger

DEBIAN = "/usr/lib/python3/dist-packages"
_MODULES = ("libvirtmod", "libvirt", "libvirtmod_qemu", "libvirt_qemu")
"""In the order in which they import each other."""

_lock = threading.Lock()
_running = False
_log = get_logger("caesura.libvirt")


class NoBinding(ConfigError):
    """There is no binding that this Python can load."""


def load_binding(folder: str) -> ModuleType:
    """The module ``libvirt``; ``libvirt_qemu`` can be imported afterwards.

    Args:
        folder: where it is; empty: what this Python has, else ``DEBIAN``.

    Raises:
        NoBinding: with the remedy.
    """
    with _lock:
        if not folder:
            try:
                importlib.import_module("libvirt_qemu")
                return importlib.import_module("libvirt")
            except ImportError:
                folder = DEBIAN
        if "libvirt" not in sys.modules:
            _load_from(folder)
        return sys.modules["libvirt"]


def _load_from(folder: str) -> None:
    try:
        for name in _MODULES:
            spec = PathFinder.find_spec(name, [folder])
            if spec is None or spec.loader is None:
                raise ImportError(f"{folder} has no {name}")  # noqa: TRY301 - as the loader itself would
            module = module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
    except Exception as error:
        for name in _MODULES:
            sys.modules.pop(name, None)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise NoBinding(
            f"libvirt's Python binding cannot be loaded: {error}. Install the package python3-libvirt, which must be for Python"
            f" {version}, or libvirt-python in this environment; [libvirt] binding names the folder with libvirt.py"
        ) from error


def run_events(libvirt: ModuleType) -> None:
    """Have libvirt's events and keep-alives handled, in a thread for the life of the process. Before the first connection."""
    global _running  # noqa: PLW0603 - the event loop is libvirt's, one a process
    with _lock:
        if _running:
            return
        _running = True
        libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_turn, args=(libvirt,), name="libvirt events", daemon=True).start()


def _turn(libvirt: ModuleType) -> None:
    # Errors are raised where a call is made; the binding prints them to standard error otherwise.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            _log.warning("libvirt.events", why=str(error))
