"""Whose process is at the other end of a Unix socket. One without a file has no permissions that would see to it."""

from __future__ import annotations

import os
import socket
import struct


def peer_is_this_user(connection: socket.socket) -> bool:
    """Whether this user's process connected or, seen from the other end, listens."""
    length = struct.calcsize("3i")
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, length))
    return uid == os.getuid()
