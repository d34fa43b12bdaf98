"""Where the pause guard listens, and how long a line to it may be. The guard and its client share this."""

SOCKET_NAME = "guard.sock"
MAX_LINE_BYTES = 8 * 1024 * 1024  # a thousand VMs with a hundred processes each


def socket_address(folder_handle: int) -> str:
    """The socket's address through an open folder: a unix socket path may have 107 bytes, folders have more."""
    return f"/proc/self/fd/{folder_handle}/{SOCKET_NAME}"
