"""Files of the internet in the user's cache: whole, resumed, and always the same ones."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from huggingface_hub import constants, hf_hub_download, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from tqdm import tqdm

_logger = logging.getLogger(__name__)

_HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class _NotFound(FileNotFoundError):
    pass


def download(address: str, offline: bool = False, sha256: str | None = None) -> Path:
    """The local copy of a file, downloaded on first use.

    Files of huggingface.co are in the hub's cache (HF_HOME; HF_ENDPOINT names a mirror), others in
    torch.hub's (TORCH_HOME), where addresses that end in the same name are the same file. What a
    file's contents were when it was first used is noted beside torch.hub's cache, and every use
    compares them.

    Args:
        address: http or https. The authors' files are found in both of their spellings,
            `flash_internimage_*` and `flash_intern_image_*`.
        offline: use what was downloaded before; HF_HUB_OFFLINE=1 says so as well.
        sha256: of the contents, if known.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the download failed; where the server permits, the next one goes on from there.
        ValueError: the contents are others than expected.
    """
    offline = offline or is_offline_mode()
    missing: list[str] = []
    for spelling in _spellings(address):
        try:
            path = _locate(spelling, offline)
        except _NotFound as error:
            missing.append(f"download of {spelling} failed: {error}")
            # without a network, only the cache can have the other spelling
            offline = offline or isinstance(error.__cause__, LocalEntryNotFoundError)
            continue
        except Exception as error:  # the hub's client lets many kinds through
            raise OSError(f"download of {spelling} failed: {error}") from error
        _compare(address, path, sha256)
        return path
    raise FileNotFoundError(missing[0] if offline else "; ".join(missing))


def _spellings(address: str) -> Iterator[str]:
    yield address
    folder, slash, name = address.rpartition("/")
    one, other = "flash_internimage_", "flash_intern_image_"
    if one in name:
        yield folder + slash + name.replace(one, other)
    elif other in name:
        yield folder + slash + name.replace(other, one)


def _offline(cache: str | Path) -> str:
    return f"not in the cache ({cache}), and --offline or HF_HUB_OFFLINE forbids downloads"


def _locate(address: str, offline: bool) -> Path:
    """
    Raises:
        _NotFound: the server has no such file or, offline or without a network, the cache.
        Exception: of any kind, the download failed.
    """
    parts = urlparse(address)
    if on_hub := _HUB.fullmatch(f"{parts.scheme}://{parts.netloc}{parts.path}"):
        repository, revision, file = map(unquote, on_hub.groups())
        try:
            path = hf_hub_download(repository, file, revision=revision, local_files_only=offline)
        except EntryNotFoundError as error:
            if offline:
                raise _NotFound(_offline(constants.HF_HUB_CACHE)) from error
            reason = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
            raise _NotFound(" ".join(reason.split())) from error
        return Path(path)
    name = Path(unquote(parts.path)).name
    if name in ("", ".."):
        raise ValueError("the address names no file")
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.exists():
        return path
    if offline:
        raise _NotFound(_offline(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _logger.info("downloading %s to %s", address, path)
            try:
                _download(address, path)
            except HTTPError as error:
                if error.code == 404:
                    raise _NotFound(str(error)) from error
                raise
    return path


def _open(address: str, **headers: str) -> HTTPResponse:
    return urlopen(Request(address, headers={"User-Agent": "torch.hub", **headers}), timeout=60)


def _download(address: str, path: Path) -> None:
    """Writes the whole file or leaves a part, from which the next attempt goes on.

    A part's name says of which version of the file it is.
    """
    with ExitStack() as stack:
        response = stack.enter_context(_open(address))
        version = response.headers["ETag"] or response.headers["Last-Modified"] or ""
        size = int(response.headers["Content-Length"] or 0)
        mark = hashlib.sha256(f"{address} {version}".encode()).hexdigest()[:8]
        part = path.with_name(f"{path.name}.{mark}.part")
        done = part.stat().st_size if version and part.exists() else 0
        if 0 < done < size:
            again = {"Range": f"bytes={done}-", "If-Range": version}
            response = stack.enter_context(_open(address, **again))
        if done != size and response.status != 206:
            done = 0
        file = stack.enter_context(open(part, "ab" if done else "wb"))
        bar = stack.enter_context(
            tqdm(desc=path.name, total=size or None, initial=done, unit="B", unit_scale=True,
                 disable=None)
        )  # fmt: skip
        while (not size or done < size) and (chunk := response.read(1 << 20)):
            file.write(chunk)
            done += len(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if size and done != size:
        raise OSError(f"the connection ended after {done:,} of {size:,} bytes")
    os.replace(part, path)


def _compare(address: str, path: Path, sha256: str | None) -> None:
    """
    Raises:
        ValueError: the contents of the file are not those that its address had.
    """
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    # an address may be longer than a file's name
    mark = hashlib.sha256(address.encode()).hexdigest()[:16]
    note = Path(torch.hub.get_dir(), "sha256", f"{path.name[:100]}.{mark}")
    noted = note.read_text().strip() if note.exists() else ""
    # the hub's cache calls large files by their sha256
    on_hub = path.resolve().name if re.fullmatch("[0-9a-f]{64}", path.resolve().name) else ""
    for expected, source in (
        (sha256, "it is known to have"),
        (on_hub, "the hub says"),
        (noted, f"it had when first used, which {note} notes"),
    ):
        if expected and expected != actual:
            raise ValueError(
                f"{address} has another sha256 than {source}: {actual}, expected {expected}. "
                f"Delete {path} to download it again"
            )
    if not noted:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(actual + "\n")
