"""Tests of downloads: caches, rejected contents, and error messages."""

import hashlib
import http.client
import io
import pickle
import resource
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import safetensors.torch
import timm
import torch

from flash_internimage.checkpoints import downloads, fetch_checkpoint, load_checkpoint
from flash_internimage.checkpoints.downloads import download
from tests.servers import COMMIT, FileServer, serve, use_as_hub, use_own_caches


def torch_file(legacy: bool = False, value: int = 1) -> bytes:
    """Return a checkpoint that spans several read buffers."""
    buffer = io.BytesIO()
    weights = {"w": torch.full((3_000_000,), value, dtype=torch.uint8)}
    torch.save(weights, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


CONTENTS = torch_file()
SHA256 = hashlib.sha256(CONTENTS).hexdigest()
PAGE = b"<!DOCTYPE html><title>Log in</title>"
TENSORS = safetensors.torch.save({"w": torch.zeros(1000)})
ON_HUB = "/OpenGVLab/DCNv4/resolve/main"
HUB = f"https://huggingface.co{ON_HUB}"
FILE = "flash_internimage_l_22kto1k_384.pth"
OTHER = "flash_intern_image_l_22kto1k_384.pth"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    use_own_caches(monkeypatch, tmp_path / "caches")
    return tmp_path / "caches"


@pytest.fixture(autouse=True)
def no_retry_delay(monkeypatch) -> None:
    """Skip the pauses of huggingface_hub between retries."""
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)


@pytest.fixture
def server(monkeypatch) -> Iterator[FileServer]:
    """Serve one checkpoint under a URL of the hub and under a plain one."""
    with serve({"/model.pth": CONTENTS, f"{ON_HUB}/model.pth": CONTENTS}) as server:
        use_as_hub(monkeypatch, server.address)
        yield server


@pytest.fixture(params=["plain", "hub"])
def base(request, server) -> str:
    return server.address if request.param == "plain" else HUB


@pytest.fixture
def address(base) -> str:
    return f"{base}/model.pth"


@pytest.fixture
def unused_address() -> Iterator[str]:
    """Return an address without a server."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


def put(server: FileServer, name: str, contents: bytes) -> None:
    server.files |= {f"/{name}": contents, f"{ON_HUB}/{name}": contents}


def kept(folder: Path) -> list[Path]:
    """Return all files except locks and the metadata of huggingface_hub."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    noted = ("CACHEDIR.TAG", "main")
    return [path for path in files if path.name not in noted and path.suffix != ".lock"]


def fails(address: str, **settings) -> str:
    """Return the message of a failed download, which must be a single line."""
    with pytest.raises(OSError, match=r"^download of .* failed: .") as error:
        download(address, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# Caches


def test_a_cached_file_is_used_without_request_hashing_or_writing(
    server, address, caches, monkeypatch
):
    path = download(address, sha256=SHA256)
    assert path.read_bytes() == CONTENTS
    before = {entry: entry.lstat() for entry in caches.rglob("*")}
    server.requests.clear()

    def refuse(*args, **kwargs):
        raise AssertionError("a cached file needs no lock and no hash")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    monkeypatch.setattr(downloads, "FileLock", refuse)
    assert download(address, sha256=SHA256) == path
    assert server.requests == []
    after = {entry: entry.lstat() for entry in caches.rglob("*")}
    assert [(e, s.st_mtime_ns) for e, s in after.items()] == [
        (e, s.st_mtime_ns) for e, s in before.items()
    ]


@pytest.mark.parametrize("query", ["?download=true", "#part"])
def test_queries_and_fragments_are_not_part_of_the_name(address, query):
    assert download(address + query).name == "model.pth"


def test_plain_files_are_in_the_cache_of_torch(server):
    path = download(f"{server.address}/model.pth")
    assert path.parents[1] == Path(torch.hub.get_dir(), "checkpoints")


@pytest.mark.parametrize("base", [HUB, f"http://hf.co{ON_HUB}"])
@pytest.mark.usefixtures("server")
def test_files_of_the_hub_are_in_its_cache(base, caches):
    path = download(f"{base}/model.pth")
    assert path == caches / f"hub/models--OpenGVLab--DCNv4/snapshots/{COMMIT}/model.pth"


@pytest.mark.parametrize("second", ["/b/model.pth", "/a/model.pth?version=2"])
def test_equal_file_names_at_different_addresses_are_cached_separately(server, second):
    server.files = {"/a/model.pth": CONTENTS}
    first = download(f"{server.address}/a/model.pth")
    server.files = dict.fromkeys(["/a/model.pth", "/b/model.pth"], torch_file(value=2))
    other = download(server.address + second)
    assert other != first
    assert load_checkpoint(first)["w"][0] == 1
    assert load_checkpoint(other)["w"][0] == 2


def test_an_address_may_be_longer_than_a_file_name(server):
    address = f"{server.address}/model.pth?{'signature=' * 100}"
    assert fetch_checkpoint(address).read_bytes() == CONTENTS


@pytest.mark.parametrize(("there", "asked_for"), [(FILE, OTHER), (OTHER, FILE)])
def test_both_spellings_are_tried(server, base, there, asked_for):
    server.files = {}
    put(server, there, CONTENTS)
    path = download(f"{base}/{asked_for}")
    assert path.name == there
    server.requests.clear()
    assert download(f"{base}/{asked_for}", offline=True) == path
    assert download(f"{base}/{asked_for}") == path
    assert server.requests == []
    assert download(f"{base}/{asked_for}?from=a/b").name == there


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_uses_the_caches_and_makes_no_request(server, base, by, monkeypatch):
    def switch(on: bool) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", on)

    offline, address = by == "argument", f"{base}/{FILE}"
    put(server, FILE, CONTENTS)
    switch(not offline)
    with pytest.raises(FileNotFoundError, match=f"{address} failed: not in the cache .*--offline"):
        download(address, offline)
    assert server.requests == []
    switch(False)
    path = download(address)
    server.requests.clear()
    switch(not offline)
    assert download(address, offline) == path
    assert server.requests == []


def test_offline_makes_no_request_for_a_name(server, monkeypatch):
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        fetch_checkpoint("flash_internimage_tiny.in1k", offline=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    overlay = {"url": f"{HUB}/model.pth"}
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        timm.create_model("flash_internimage_nano", pretrained=True, pretrained_cfg_overlay=overlay)
    assert server.requests == []


@pytest.mark.parametrize("change", ["no server", "gone", "proxy"])
def test_a_cached_file_needs_no_network(server, address, change, unused_address, monkeypatch):
    path = download(address)
    if change == "no server":
        use_as_hub(monkeypatch, unused_address)
        server.shutdown()
        server.socket.close()
    elif change == "gone":
        server.files.clear()
    else:
        monkeypatch.setenv("http_proxy", unused_address)
        monkeypatch.delenv("no_proxy")
    assert download(address) == path


def test_simultaneous_downloads_fetch_the_file_once(server, address):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(download, [address] * 4))
    assert len(paths) == 1
    [body] = [path for method, path, _ in server.requests if method == "GET" and ".pth" in path]
    assert body.endswith("/model.pth")
    assert paths.pop().read_bytes() == CONTENTS


# Contents


@pytest.mark.parametrize(
    ("name", "contents"),
    [("model.pth", torch_file(legacy=True)), ("model.safetensors", TENSORS)],
)
def test_other_formats_are_accepted(server, base, name, contents):
    put(server, name, contents)
    path = download(f"{base}/{name}")
    assert path.read_bytes() == contents
    assert load_checkpoint(path)["w"].shape
    server.requests.clear()
    download(f"{base}/{name}")
    assert server.requests == []


BROKEN = {
    "page": ("model.pth", PAGE),
    "page for tensors": ("model.safetensors", PAGE),
    "empty": ("model.pth", b""),
    "half": ("model.pth", CONTENTS[: len(CONTENTS) // 2]),
    "half of the tensors": ("model.safetensors", TENSORS[:-100]),
    "too many tensors": ("model.safetensors", TENSORS + b"\0"),
    "tensors of another name": ("model.pth", TENSORS),
    "compressed": ("model.pth", b"\x1f\x8b" + CONTENTS),
    "old pickle": ("model.pth", pickle.dumps({"w": 1}, protocol=0)),
}


@pytest.mark.parametrize(("name", "contents"), BROKEN.values(), ids=BROKEN)
def test_contents_other_than_a_checkpoint_are_not_cached(server, base, name, contents, caches):
    put(server, name, contents)
    address = f"{base}/{name}"
    message = fails(address)
    assert f"{address} failed: not a complete checkpoint: it begins with" in message
    assert kept(caches) == []
    whole = TENSORS if name.endswith("safetensors") else CONTENTS
    put(server, name, whole)
    assert download(address).read_bytes() == whole


@pytest.mark.parametrize("contents", [PAGE, CONTENTS[:-1000]])
def test_a_damaged_file_in_the_cache_is_downloaded_again(server, address, contents):
    path = download(address)
    path.write_bytes(contents)
    assert "not in the cache" in fails(address, offline=True)
    assert download(address) == path
    assert path.read_bytes() == CONTENTS


def test_a_truncated_body_is_rejected(server, caches):
    server.cut = len(CONTENTS) - 1000
    assert "ended 1,000 bytes too early" in fails(f"{server.address}/model.pth")
    assert kept(caches) == []
    server.headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    server.files["/model.pth"] = b"FFFFFF\r\n" + CONTENTS  # a chunk longer than the body
    assert "IncompleteRead" in fails(f"{server.address}/model.pth")
    assert kept(caches) == []


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.parametrize("length", [len(CONTENTS) // 2, 10**15])
def test_a_wrong_length_is_rejected(server, address, length, caches):
    server.headers = {"Content-Length": length}
    fails(address)
    assert kept(caches) == []
    server.headers = {}
    assert download(address).read_bytes() == CONTENTS


@pytest.mark.parametrize("size", [len(CONTENTS) - 1, len(CONTENTS) + 1])
def test_a_length_other_than_the_hubs_is_rejected(server, size, caches):
    server.headers = {"X-Linked-Size": size}
    assert f"size {size} " in fails(f"{HUB}/model.pth")
    assert kept(caches) == []


def test_huggingface_hub_resumes_after_a_lost_connection(server, monkeypatch):
    third = len(CONTENTS) // 3
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", third)
    server.cut = third + 10  # The client discards incomplete chunks.
    assert download(f"{HUB}/model.pth").read_bytes() == CONTENTS
    asked = [wanted for method, path, wanted in server.requests if path.endswith("model.pth")]
    assert asked[1:3] == [None, f"bytes={third}-"]


def test_a_wrong_sha256_is_an_error(server, address, caches):
    message = rf"SHA-256 mismatch for {address}: expected {'0' * 64}, got {SHA256}"
    with pytest.raises(ValueError, match=message):
        download(address, sha256="0" * 64)
    assert kept(caches) == []
    path = download(address)
    with pytest.raises(ValueError, match=message):
        download(address, sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        download(address, offline=True, sha256="0" * 64)
    assert download(address, sha256=SHA256).read_bytes() == CONTENTS
    assert path.name == "model.pth"


def test_the_sha256_of_the_hub_is_checked(server, caches):
    server.headers = {"ETag": f'"{"1" * 64}"'}
    with pytest.raises(ValueError, match=f"expected {'1' * 64}, got {SHA256}"):
        download(f"{HUB}/model.pth")
    assert kept(caches) == []
    server.headers = {"ETag": f'"{"1" * 40}"'}  # For small files, the ETag is git's SHA-1.
    assert download(f"{HUB}/model.pth").read_bytes() == CONTENTS


def test_partial_files_of_a_killed_process_are_removed(server):
    address = f"{server.address}/model.pth"
    path = download(address)
    path.rename(path.with_name(".model.pth.0123.partial"))
    assert download(address) == path
    assert list(path.parent.iterdir()) == [path]


# Errors


@pytest.mark.parametrize("status", [401, 403, 404, 410, 429, 500, 503])
def test_an_http_error_status_is_an_error(server, address, status, caches):
    server.status = status
    assert f"download of {address} failed: " in fails(address)
    assert str(status) in fails(address)
    assert kept(caches) == []


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, "GatedRepo", "Cannot access gated repo"),
        (401, "RepoNotFound", "Repository Not Found"),
        (404, "RevisionNotFound", "Revision Not Found"),
        (404, "EntryNotFound", "Entry Not Found"),
    ],
)
def test_an_error_of_the_hub_is_reported_in_one_line(server, status, code, reason):
    server.status, server.headers = status, {"X-Error-Code": code}
    assert reason in fails(f"{HUB}/model.pth")


@pytest.mark.usefixtures("server")
def test_the_error_names_both_spellings(base):
    with pytest.raises(FileNotFoundError, match=f"{base}/{FILE} .*404.*{base}/{OTHER} .*404"):
        download(f"{base}/{FILE}")


@pytest.mark.parametrize("by", ["address", "proxy"])
def test_a_failed_connection_is_an_error(base, by, unused_address, monkeypatch, request):
    if by == "address":
        use_as_hub(monkeypatch, unused_address)
        base = base if base == HUB else unused_address
    else:
        monkeypatch.setenv("http_proxy", unused_address)
        monkeypatch.delenv("no_proxy")
        huggingface_hub.close_session()  # An open session keeps its proxies.
        request.addfinalizer(huggingface_hub.close_session)
    message = fails(f"{base}/{FILE}")
    assert message.startswith(f"download of {base}/{FILE} failed: ")
    assert "Connection refused" in message
    assert ";" not in message


def test_an_unknown_host_is_an_error(address, monkeypatch):
    def fail(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert "Name or service not known" in fails(address)


def test_a_silent_server_is_an_error(server, address, monkeypatch):
    server.silent = True
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.05)
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(huggingface_hub.constants, name, 0.05)
    monkeypatch.setattr(huggingface_hub.file_download, "_ETAG_RETRY_TIMEOUT", 0.05)
    assert "timed out" in fails(address)


def test_a_full_disk_is_an_error(server, address, caches):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert "File too large" in fails(address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert kept(caches) == []
    assert download(address).read_bytes() == CONTENTS


def test_a_cache_that_cannot_be_written_is_an_error(address, caches):
    caches.write_text("not a folder")
    assert "Not a directory" in fails(address) or "File exists" in fails(address)


@pytest.mark.parametrize("path", ["", "/", "/a/..", "/%2e%2e", "?/model.pth"])
def test_an_address_without_a_file_is_an_error(path, caches):
    assert "the URL must contain a file name" in fails(f"http://127.0.0.1:1{path}")
    assert not caches.exists()


def test_names_may_contain_spaces_and_non_ascii_letters(server, base):
    put(server, "my%20mod%C3%A8le.pth", CONTENTS)
    assert download(f"{base}/my modèle.pth").name == "my modèle.pth"
    assert download(f"{base}/my%20mod%C3%A8le.pth").name == "my modèle.pth"


# Redirects and secrets


@pytest.mark.parametrize("location", ["{0}/there", "there", "/there"])
def test_redirects_are_followed(server, address, location):
    server.files["/there"] = server.files[f"{ON_HUB}/there"] = CONTENTS
    for path in ("/model.pth", f"{ON_HUB}/model.pth"):
        server.redirects[path] = location.format(server.address)
    server.headers = {"X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": len(CONTENTS)}
    path = download(address)
    assert path.name == "model.pth"
    assert path.read_bytes() == CONTENTS


@pytest.mark.parametrize("location", ["file://{0}", "ftp://127.0.0.1/{0}", "data:,{0}", "//["])
def test_redirects_to_other_schemes_are_rejected(server, address, location, tmp_path, caches):
    (tmp_path / "secret.pth").write_bytes(CONTENTS)
    for path in ("/model.pth", f"{ON_HUB}/model.pth"):
        server.redirects[path] = location.format(tmp_path / "secret.pth")
    server.headers = {"X-Linked-Etag": f'"{SHA256}"', "X-Linked-Size": len(CONTENTS)}
    fails(address)
    assert kept(caches) == []


def test_a_redirect_loop_is_an_error(server, address):
    for path in ("/model.pth", f"{ON_HUB}/model.pth"):
        server.redirects[path] = path
    server.headers = {"X-Linked-Etag": f'"{SHA256}"'}
    fails(address)


def test_https_is_not_redirected_to_http(server, monkeypatch, caches):
    def connect(handler, request):
        return handler.do_open(http.client.HTTPConnection, request)

    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", connect)
    secure = server.address.replace("http:", "https:")
    server.redirects["/model.pth"] = f"{server.address}/there.pth"
    server.files["/there.pth"] = CONTENTS
    assert "refused a redirect from https to http" in fails(f"{secure}/model.pth")
    assert kept(caches) == []
    server.redirects["/up.pth"] = f"{secure}/there.pth"
    assert download(f"{server.address}/up.pth").read_bytes() == CONTENTS


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/model.pth", "/a.pth"])
def test_other_schemes_are_rejected(address):
    assert "must be http(s)://" in fails(address)


def test_secrets_in_addresses_are_not_shown(server, address, caplog):
    caplog.set_level("INFO")
    download(f"{address}?token=secret")
    messages = [fails(f"{address.replace('model', 'none')}?token=secret#secret")]
    messages.append(fails(f"{server.address}/none.pth?a=1&token=a secret"))
    messages.append(fails(f"{server.address.replace('//', '//user:secret@')}/model.pth"))
    server.redirects["/model.pth"] = "ftp://user:secret@127.0.0.1/model.pth?token=secret"
    messages.append(fails(f"{server.address}/model.pth?a=2"))
    with pytest.raises(ValueError, match="SHA-256") as error:
        download(f"{server.address}{ON_HUB}/model.pth?token=secret", sha256="0" * 64)
    with pytest.raises(FileNotFoundError) as not_found:
        fetch_checkpoint("ftp://user:secret@127.0.0.1/model.pth?token=secret")
    text = "\n".join([*messages, str(error.value), str(not_found.value), caplog.text])
    assert "secret" not in text
    assert "downloading" in text
