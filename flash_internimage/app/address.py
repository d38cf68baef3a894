"""The address at which the page is served."""

import errno
import socket


def free_port(host: str, port: int) -> int:
    """Return a port that the page can use.

    Args:
        host: Address of this machine.
        port: Number of the port; 0 for any that is free.

    Raises:
        ValueError: If `host` is not an address of this machine, or the port cannot be used.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host must be an address of this machine, got {host}") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(
                    f"--host must be an address of this machine, got {host}"
                ) from error
            raise ValueError(
                f"--port must be free, got {port} on {host}: {error.strerror}"
            ) from error
        return server.getsockname()[1]
