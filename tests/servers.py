"""Servers on this machine for what is downloaded elsewhere."""

import hashlib
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FileServer(ThreadingHTTPServer):
    """Serves `files`, contents by path, as the hub does: by parts, and in versions.

    Attributes:
        cut: answers end after so many bytes, though they promise all of them.
        ranges: whether it honours requests for a part.
        requests: method, path and wanted part of those it had.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.cut: int | None = None
        self.ranges = True
        self.requests: list[tuple[str, str, str | None]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients leave early in some tests
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        contents = self._answer()
        self.wfile.write(contents[: self.server.cut])

    def _answer(self) -> bytes:
        path, wanted = urlsplit(self.path).path, self.headers["Range"]
        self.server.requests.append((self.command, path, wanted))
        contents = self.server.files.get(path)
        if contents is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self._end({"Content-Length": "0"})
            return b""
        version = f'"{hashlib.sha256(contents).hexdigest()}"'
        size = len(contents)
        headers = {"ETag": version, "Accept-Ranges": "bytes"}
        fresh = self.headers["If-Range"] in (None, version)
        if wanted and self.server.ranges and fresh:
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206)
            headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            contents = contents[first:]
        else:
            self.send_response(200)
        self._end(headers | {"Content-Length": str(len(contents))})
        return contents

    def _end(self, headers: dict[str, str]) -> None:
        for name, value in {"X-Repo-Commit": COMMIT, "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FileServer]:
    with FileServer(files) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def use_own_caches(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Downloads go to `folder`, and servers of this machine are reached without a proxy."""
    monkeypatch.setenv("TORCH_HOME", f"{folder}/torch")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", f"{folder}/hub")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def use_as_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What HF_ENDPOINT does where it is set before the hub's client is imported."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
