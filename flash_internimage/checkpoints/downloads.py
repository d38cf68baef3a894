"""Download checkpoints into the caches of huggingface_hub and torch.hub."""

import hashlib
import logging
import os
import re
import shutil
import string
import uuid
import zipfile
from contextlib import suppress
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, BinaryIO
from urllib.error import URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from filelock import FileLock
from huggingface_hub import constants, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from tqdm import tqdm

from ..files import remove_partial_files, write_atomically

_logger = logging.getLogger(__name__)

_HUB = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/resolve/([^/]+)/([^?#]+).*")
_TIMEOUT = 60  # seconds without a response


def download(
    address: str,
    offline: bool = False,
    sha256: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Return the local copy of a checkpoint, downloading it on first use.

    Files on huggingface.co are stored in the hub's cache (`HF_HOME`; `HF_ENDPOINT` selects a
    mirror), others in that of torch.hub (`TORCH_HOME`), in one folder per URL. Length, format and
    SHA-256 (if given here or stated by the hub) are checked once, when downloading. A cached file
    is used without a request, hashing or writing; one that is truncated or not a checkpoint is
    downloaded again.

    Args:
        address: http or https URL. The authors' files are found under both of their spellings,
            `flash_internimage_*` and `flash_intern_image_*`.
        offline: Use cached files only, like `HF_HUB_OFFLINE=1`.
        sha256: Expected SHA-256 of the file.
        cache_dir: Folder to use instead of either cache, with the same layout.

    Returns:
        Path of the file in the cache.

    Raises:
        FileNotFoundError: If the file does not exist or, offline, is not in the cache.
        OSError: If the download fails or is not a checkpoint.
        ValueError: If the file does not have the expected SHA-256.
    """
    address = quote(address, safe=string.punctuation)  # URLs may contain spaces, also in secrets.
    offline = offline or is_offline_mode()
    folder = None if cache_dir is None else Path(cache_dir)
    missing = []
    for find in [_find] if offline else [_find, _fetch]:
        for spelling in _spellings(address):
            try:
                if path := find(spelling, sha256, folder):
                    return path
            except _WrongContents:
                raise
            except Exception as error:  # huggingface_hub raises errors of many types.
                cause: BaseException = error
                if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
                    cause = error.__cause__  # the failed request
                reason = " ".join(str(cause).split()) or type(cause).__name__
                missing.append(hide_secrets(f"download of {spelling} failed: {reason}"))
                if getattr(cause, "code", 0) != 404 and not isinstance(cause, EntryNotFoundError):
                    raise OSError(missing[-1]) from cause
    cache = cache_dir
    if cache is None:
        cache = constants.HF_HUB_CACHE if _HUB.fullmatch(address) else torch.hub.get_dir()
    absent = (
        f"download of {hide_secrets(address)} failed: not in the cache ({cache}) or damaged there, "
        "and --offline or HF_HUB_OFFLINE forbids downloads"
    )
    raise FileNotFoundError("; ".join(missing) or absent)


def hide_secrets(text: str) -> str:
    """Replace user names, passwords and query strings in the URLs of a text with '...'."""
    text = re.sub(r"(?<=://)[^/\s]*@", "...@", text)
    return re.sub(r"(://[^\s?#]*)[?#]\S*", r"\1?...", text)


class _WrongContents(ValueError):
    pass


def _spellings(address: str) -> list[str]:
    base = re.split("[?#]", address, maxsplit=1)[0]
    folder, slash, name = base.rpartition("/")
    one, other = "flash_internimage_", "flash_intern_image_"
    swapped = name.replace(one, other) if one in name else name.replace(other, one)
    return list(dict.fromkeys([address, folder + slash + swapped + address[len(base) :]]))


def _key(address: str, sha256: str | None) -> str:
    # Including the SHA-256 prevents reuse of a file that was downloaded without checking it.
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{address.partition('#')[0]} {sha256 or ''}").hex


def _path_in_hub(on_hub: re.Match[str], cache_dir: Path | None) -> Path | None:
    """Return the path of a file in the hub's cache; None if it is not there."""
    repository, revision, file = map(unquote, on_hub.groups())
    path = try_to_load_from_cache(repository, file, cache_dir, revision)
    return Path(path) if isinstance(path, str) else None


def _path_in_torch(address: str, sha256: str | None, cache_dir: Path | None) -> Path:
    """Return the path of a file in the cache of torch.hub, whether it is there or not."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:
        raise ValueError("the URL must be http(s)://HOST/PATH without a user name")
    name = Path(unquote(parts.path)).name
    if name in ("", ".."):
        raise ValueError("the URL must contain a file name")
    cache_dir = Path(torch.hub.get_dir(), "checkpoints") if cache_dir is None else cache_dir
    return cache_dir / _key(address, sha256) / name


def _hub_sha256(path: Path) -> str | None:
    """Return the SHA-256 of a large file in the hub's cache, which is the name of its blob."""
    name = path.readlink().name if path.is_symlink() else ""
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _find(address: str, sha256: str | None, cache_dir: Path | None) -> Path | None:
    """Return the cached file unless it is missing, truncated or known to have another SHA-256."""
    if on_hub := _HUB.fullmatch(address):
        path = _path_in_hub(on_hub, cache_dir)
    else:
        path = _path_in_torch(address, sha256, cache_dir)
    if path and path.is_file() and _is_whole(path, path.name):
        stated = _hub_sha256(path)
        return path if stated == sha256 or None in (stated, sha256) else None
    return None


def _fetch(address: str, sha256: str | None, cache_dir: Path | None) -> Path:
    on_hub = _HUB.fullmatch(address)
    if on_hub:
        locks = (cache_dir or Path(constants.HF_HUB_CACHE)) / ".locks"
    else:
        locks = _path_in_torch(address, sha256, cache_dir).parents[1]
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{_key(address, sha256)}.lock"):
        if found := _find(address, sha256, cache_dir):  # downloaded by another process
            return found
        _logger.info("downloading %s", hide_secrets(address))
        if on_hub:
            return _fetch_from_hub(address, on_hub, sha256, cache_dir)
        return _fetch_from_server(address, _path_in_torch(address, sha256, cache_dir), sha256)


def _fetch_from_hub(
    address: str, on_hub: re.Match[str], sha256: str | None, cache_dir: Path | None
) -> Path:
    repository, revision, file = map(unquote, on_hub.groups())
    force = _path_in_hub(on_hub, cache_dir) is not None
    path = Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir,
                                force_download=force))  # fmt: skip
    try:
        for expected in {sha256, _hub_sha256(path)}:
            _check(address, path, path.name, expected)
    except BaseException:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise
    return path


class _Redirects(HTTPRedirectHandler):
    """Reject redirects from https to http and to other protocols, which urllib would follow."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("https", req.type):
            raise URLError(f"refused a redirect from {req.type} to {scheme}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch_from_server(address: str, path: Path, sha256: str | None) -> Path:
    # torch.hub.download_url_to_file accepts truncated files and any redirect, and has no timeout.
    def write(file: BinaryIO) -> None:
        size = response.length
        with tqdm.wrapattr(response, "read", size, desc=path.name, disable=None) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
        if response.length:
            raise OSError(f"the connection ended {response.length:,} bytes too early")
        file.flush()
        _check(address, Path(file.name), path.name, sha256)

    path.parent.mkdir(exist_ok=True)
    remove_partial_files(path.parent)
    request = Request(address, headers={"User-Agent": "torch.hub"})
    try:
        with build_opener(_Redirects).open(request, timeout=_TIMEOUT) as response:
            write_atomically(path, write)
    finally:
        with suppress(OSError):
            path.parent.rmdir()  # only succeeds if a failure left it empty
    return path


def _is_whole(path: Path, name: str) -> bool:
    """Return whether the start and end of a file are those of a complete checkpoint."""
    try:
        if name.endswith(".safetensors"):
            with safe_open(path, "pt"):  # compares the length with the header
                return True
        with open(path, "rb") as file:
            start = file.read(2)
    except Exception:
        return False
    # A zip file ends with its directory. Old versions of torch wrote plain pickles.
    return zipfile.is_zipfile(path) if start == b"PK" else b"\x80\x02" <= start <= b"\x80\x05"


def _check(address: str, path: Path, name: str, sha256: str | None) -> None:
    """Check a file that was just downloaded.

    Raises:
        OSError: If it is not a checkpoint or truncated.
        _WrongContents: If it has another SHA-256.
    """
    with open(path, "rb") as file:
        if not _is_whole(path, name):
            raise OSError(f"not a complete checkpoint: it begins with {file.read(16)!r}")
        actual = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
    if actual != sha256:
        raise _WrongContents(
            f"SHA-256 mismatch for {hide_secrets(address)}: expected {sha256}, got {actual}"
        )
