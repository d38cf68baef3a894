"""Downloads: what the cache holds afterwards, and what an error says."""

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
import torch

from flash_internimage.downloads import download
from tests.servers import COMMIT, FileServer, serve, use_as_hub, use_own_caches

CONTENTS = bytes(range(256)) * 20_000  # some pieces of those in which it is read
SHA256 = hashlib.sha256(CONTENTS).hexdigest()
ON_HUB = "/OpenGVLab/DCNv4/resolve/main"
HUB = f"https://huggingface.co{ON_HUB}"
FILE = "flash_internimage_l_22kto1k_384.pth"
OTHER = "flash_intern_image_l_22kto1k_384.pth"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    use_own_caches(monkeypatch, tmp_path / "caches")
    return tmp_path / "caches"


@pytest.fixture
def server(monkeypatch) -> Iterator[FileServer]:
    """Of one file under both kinds of address."""
    with serve({"/model.pth": CONTENTS, f"{ON_HUB}/model.pth": CONTENTS}) as server:
        use_as_hub(monkeypatch, server.address)
        yield server


@pytest.fixture(params=["plain", "hub"])
def address(request, server) -> str:
    return f"{server.address if request.param == 'plain' else HUB}/model.pth"


def checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def parts() -> list[Path]:
    return list(checkpoints().glob("*.part"))


def bodies(server: FileServer) -> int:
    return sum(method == "GET" for method, *_ in server.requests)


@pytest.fixture
def no_waiting(monkeypatch) -> None:
    """The hub's client tries again after seconds."""
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)


# What is in the cache


def test_a_file_is_downloaded_once(server, address):
    path = download(address)
    assert path.read_bytes() == CONTENTS
    before, asked = path.stat(), bodies(server)
    assert download(address) == path
    assert path.stat() == before
    assert bodies(server) == asked
    assert parts() == []


@pytest.mark.parametrize("query", ["?download=true", "#part"])
def test_queries_and_fragments_are_not_of_the_name(address, query):
    assert download(address + query).name == "model.pth"


def test_plain_files_are_in_the_cache_of_torch(server):
    assert download(f"{server.address}/model.pth") == checkpoints() / "model.pth"


def test_files_of_the_hub_are_in_its_cache(server, caches):
    path = download(f"{HUB}/model.pth")
    assert path == caches / f"hub/models--OpenGVLab--DCNv4/snapshots/{COMMIT}/model.pth"


def test_the_environment_names_cache_and_mirror(server, tmp_path):
    program = f"from flash_internimage.downloads import download; download('{HUB}/model.pth')"
    environment = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    [path] = (tmp_path / "elsewhere").rglob("model.pth")
    assert path.read_bytes() == CONTENTS


@pytest.mark.parametrize(("there", "asked_for"), [(FILE, OTHER), (OTHER, FILE)])
@pytest.mark.parametrize("kind", ["plain", "hub"])
def test_both_spellings_are_tried(server, kind, there, asked_for):
    server.files = {f"/{there}": CONTENTS, f"{ON_HUB}/{there}": CONTENTS}
    address = f"{server.address if kind == 'plain' else HUB}/{asked_for}"
    path = download(address)
    assert path.name == there
    assert download(address, offline=True) == path


# Interruptions


def test_a_broken_download_goes_on_where_it_ended(server):
    address, half = f"{server.address}/model.pth", len(CONTENTS) // 2
    server.cut = half
    with pytest.raises(OSError, match=rf"{address} failed: .*{half:,} of {len(CONTENTS):,} bytes"):
        download(address)
    assert not (checkpoints() / "model.pth").exists()
    server.cut = None
    assert download(address).read_bytes() == CONTENTS
    assert server.requests[-1] == ("GET", "/model.pth", f"bytes={half}-")
    assert parts() == []


@pytest.mark.usefixtures("no_waiting")
def test_the_hubs_client_goes_on_where_the_connection_broke(server, monkeypatch):
    third = len(CONTENTS) // 3
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", third)
    server.cut = third + 10  # it drops parts of chunks
    assert download(f"{HUB}/model.pth").read_bytes() == CONTENTS
    asked = [wanted for method, path, wanted in server.requests if path.endswith("model.pth")]
    assert asked[-2:] == [f"bytes={third}-", f"bytes={2 * third}-"]


def test_a_file_that_changed_meanwhile_begins_anew(server):
    address = f"{server.address}/model.pth"
    server.cut = 1000
    with pytest.raises(OSError, match="ended"):
        download(address)
    server.cut, server.files["/model.pth"] = None, CONTENTS[::-1]
    assert download(address).read_bytes() == CONTENTS[::-1]


def test_a_server_without_ranges_begins_anew(server):
    server.cut = 1000
    with pytest.raises(OSError, match="ended"):
        download(f"{server.address}/model.pth")
    server.cut, server.ranges = None, False
    assert download(f"{server.address}/model.pth").read_bytes() == CONTENTS


def test_a_part_that_is_whole_is_taken(server):
    server.cut = 1000
    with pytest.raises(OSError, match="ended"):
        download(f"{server.address}/model.pth")
    [part] = parts()
    part.write_bytes(CONTENTS)  # as after a kill at the last moment
    assert download(f"{server.address}/model.pth").read_bytes() == CONTENTS


def test_those_who_ask_together_download_once(server):
    address = f"{server.address}/model.pth"
    with ThreadPoolExecutor(4) as pool:
        assert len({path.stat().st_ino for path in pool.map(download, [address] * 4)}) == 1
    assert bodies(server) == 1
    assert (checkpoints() / "model.pth").read_bytes() == CONTENTS


# Errors


def test_a_file_that_is_not_there_is_an_error(server, address):
    missing = address.replace("model", "none")
    with pytest.raises(FileNotFoundError, match=rf"download of {missing} failed: .*404"):
        download(missing)
    assert not [path for path in checkpoints().glob("*") if path.suffix != ".lock"]


def test_the_error_names_both_spellings(server):
    with pytest.raises(FileNotFoundError, match=f"{HUB}/{FILE} .*404.*{HUB}/{OTHER} .*404"):
        download(f"{HUB}/{FILE}")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("kind", ["plain", "hub"])
def test_no_network_is_an_error(kind, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    use_as_hub(monkeypatch, nowhere)
    address = f"{nowhere if kind == 'plain' else HUB}/{FILE}"
    message = rf"^download of {address} failed: [^;]*Connection refused[^;]*$"
    with pytest.raises(OSError, match=message):
        download(address)


@pytest.mark.usefixtures("no_waiting")
def test_without_network_the_cache_serves(server, address):
    path = download(address)
    server.shutdown()
    server.socket.close()
    assert download(address) == path


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_takes_what_is_there_and_asks_nobody(server, address, by, monkeypatch):
    if by == "environment":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = by == "argument"
    with pytest.raises(
        FileNotFoundError, match=f"download of {address} failed: not in the cache .*--offline"
    ):
        download(address, offline)
    assert server.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    path = download(address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", by == "environment")
    server.requests.clear()
    assert download(address, offline) == path
    assert server.requests == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
def test_a_full_disk_is_an_error(server):
    server.cut = 1000
    with pytest.raises(OSError, match="ended"):
        download(f"{server.address}/model.pth")
    server.cut, [part] = None, parts()
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"download of .* failed: .*No space left on device"):
        download(f"{server.address}/model.pth")
    assert not (checkpoints() / "model.pth").exists()


def test_a_full_disk_of_the_hubs_cache_is_an_error(server, monkeypatch):
    def run_out_of_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", run_out_of_space)
    with pytest.raises(OSError, match=rf"download of {HUB}/model.pth failed: .*No space left"):
        download(f"{HUB}/model.pth")


@pytest.mark.usefixtures("no_waiting")
def test_without_network_the_cache_serves_the_other_spelling(server):
    server.files = {f"{ON_HUB}/{OTHER}": CONTENTS}
    path = download(f"{HUB}/{FILE}")
    server.shutdown()
    server.socket.close()
    assert download(f"{HUB}/{FILE}") == path


@pytest.mark.parametrize("path", ["", "/", "/a/..", "/%2e%2e"])
def test_an_address_without_a_file_is_an_error(path, caches):
    with pytest.raises(OSError, match="the address names no file"):
        download(f"http://127.0.0.1:1{path}")
    assert not caches.exists()


# sha256


def test_another_file_than_expected_is_an_error(address):
    assert download(address, sha256=SHA256).read_bytes() == CONTENTS
    message = rf"{address} has another sha256 than .*: {SHA256}, expected {'0' * 64}"
    with pytest.raises(ValueError, match=message):
        download(address, sha256="0" * 64)


def test_an_address_may_be_longer_than_a_name(server):
    server.files[f"/model.pth?{'signature=' * 100}"] = CONTENTS
    address = f"{server.address}/model.pth?{'signature=' * 100}"
    assert download(address) == download(address)


def test_a_file_that_changed_since_its_first_use_is_an_error(address):
    path = download(address)
    damaged = bytearray(CONTENTS)
    damaged[1000] ^= 1
    path.resolve().write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"expected {SHA256}. Delete {path} to download"):
        download(address)


def test_a_server_with_another_file_than_at_the_first_use_is_an_error(server):
    address = f"{server.address}/model.pth"
    download(address).unlink()
    server.files["/model.pth"] = CONTENTS[::-1]
    with pytest.raises(ValueError, match=f"expected {SHA256}"):
        download(address)


def test_the_hub_is_asked_for_the_first_sha256(server):
    path = download(f"{HUB}/model.pth")
    shutil.rmtree(Path(torch.hub.get_dir()) / "sha256")
    path.resolve().write_bytes(CONTENTS[::-1])
    with pytest.raises(ValueError, match=f"than the hub says: .*, expected {SHA256}"):
        download(f"{HUB}/model.pth")
