"""A port for processes that find each other on this machine."""

import socket


def free_port() -> int:
    """One that nobody listens on now. Launchers of older releases take 0 by the word, and their processes wait."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
