"""What systemd and a service tell each other: readiness, the watchdog, and sockets that systemd has opened.

See sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3). Without systemd, nothing of it happens."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

SECONDS = 0.2  # that a message may wait, because the event loop waits with it
FIRST = 3  # the first descriptor of a socket that systemd passes


def notify(state: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send a state such as READY=1 to systemd; return whether there is one that listens."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(SECONDS)
        try:
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.sendall(state.encode())
        except OSError:  # systemd is gone, or does not read; a service goes on without it
            return False
    return True


def watchdog_seconds(environment: Mapping[str, str] = os.environ, process: int | None = None) -> float | None:
    """Return how often systemd wants to hear of this process; None if it does not."""
    given, of = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not given.isdigit() or not int(given) or (of and of != str(process or os.getpid())):
        return None
    return int(given) / 1e6


def sockets(environment: Mapping[str, str] = os.environ, process: int | None = None) -> list[socket.socket]:
    """Return the listening sockets that systemd has opened for this process."""
    number, of = environment.get("LISTEN_FDS", ""), environment.get("LISTEN_PID", "")
    if not number.isdigit() or of != str(process or os.getpid()):
        return []
    found = [socket.socket(fileno=descriptor) for descriptor in range(FIRST, FIRST + int(number))]
    for item in found:
        item.set_inheritable(False)
    return found
