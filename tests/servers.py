"""Local HTTP servers that replace those of the checkpoints."""

import hashlib
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest

AnyServer = TypeVar("AnyServer", bound="FileServer")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FileServer(ThreadingHTTPServer):
    """Serve `files`, a dict of contents by path, like the Hugging Face Hub.

    Attributes:
        status: Status of every response; only 200 comes with a file.
        redirects: Locations by path, sent with status 302.
        headers: Headers that are added or replaced; None removes one.
        cut: Number of bytes after which the connection ends early.
        silent: Whether to leave requests unanswered.
        requests: Method, path and range of each request.
    """

    def __init__(
        self, files: dict[str, bytes], handler: type[BaseHTTPRequestHandler] | None = None
    ):
        super().__init__(("127.0.0.1", 0), handler or FileHandler)
        self.files = files
        self.status = 200
        self.redirects: dict[str, str] = {}
        self.headers: dict[str, str | None] = {}
        self.cut: int | None = None
        self.silent = False
        self.requests: list[tuple[str, str, str | None]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.closing = threading.Event()

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # Some clients disconnect early.
            super().handle_error(request, client_address)


class FileHandler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer()[: self.server.cut])

    def _answer(self) -> bytes:
        path, wanted = urlsplit(self.path).path, self.headers["Range"]
        self.server.requests.append((self.command, path, wanted))
        if self.server.silent:
            self.server.closing.wait()
        if path in self.server.redirects:
            return self._send(302, {"Location": self.server.redirects[path]})
        if self.server.status != 200:
            return self._send(self.server.status, {})
        contents = self.server.files.get(path)
        if contents is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(contents).hexdigest()}"'}
        if wanted is None:
            return self._send(200, headers, contents)
        first, size = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]), len(contents)
        headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
        return self._send(206, headers, contents[first:])

    def _send(self, status: int, headers: dict[str, str], contents: bytes = b"") -> bytes:
        usual = {"X-Repo-Commit": COMMIT, "Connection": "close", "Content-Length": len(contents)}
        self.send_response(status)
        for name, value in {**usual, **headers, **self.server.headers}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        return contents


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FileServer]:
    with running(FileServer(files)) as server:
        yield server


@contextmanager
def running(server: AnyServer) -> Iterator[AnyServer]:
    """Run a server in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def use_own_caches(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Download to `folder`, and access local servers without a proxy."""
    monkeypatch.setenv("TORCH_HOME", f"{folder}/torch")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", f"{folder}/hub")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def use_as_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Use another endpoint, as HF_ENDPOINT does when set before importing huggingface_hub."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
