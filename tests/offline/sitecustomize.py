"""Block every socket but loopback, in the tests and in the scripts that they start.

tests/conftest.py puts this folder on PYTHONPATH, and Python imports a module of this name at start.
"""

import socket

_connect = socket.socket.connect


def _loopback_only(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"the tests run offline; refused to connect to {address}")
    return _connect(self, address)


def _no_lookup(host, *args, **kwargs):
    if host not in (None, "", "127.0.0.1", "::1", "localhost", b"localhost"):
        raise OSError(f"the tests run offline; refused to look up {host!r}")
    return _getaddrinfo(host, *args, **kwargs)


_getaddrinfo = socket.getaddrinfo
socket.socket.connect = _loopback_only
socket.getaddrinfo = _no_lookup
