from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mmengine.fileio import BaseStorageBackend, io, register_backend
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.logging import MMLogger


@pytest.fixture(autouse=True)
def always_restore_scope(restore_scope):
    """In all tests of this folder."""


@pytest.fixture
def log(caplog, request):
    """What the engine's current logger says."""
    logger = MMLogger.get_instance(request.module.__name__)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def memory(tmp_path) -> Iterator[dict[str, bytes]]:
    """Files of a server, by their addresses memory://..."""
    files: dict[str, bytes] = {}

    class Memory(BaseStorageBackend):
        def get(self, filepath: str) -> bytes:
            return files[filepath]

        def get_text(self, filepath: str, encoding: str = "utf-8") -> str:
            return files[filepath].decode(encoding)

        @contextmanager
        def get_local_path(self, filepath: str) -> Iterator[Path]:
            (tmp_path / "local").write_bytes(files[filepath])
            yield tmp_path / "local"

    register_backend("memory", Memory, prefixes="memory")
    yield files
    del backends["memory"], prefix_to_backends["memory"]
    for key in [key for key in io.backend_instances if "memory" in key]:
        del io.backend_instances[key]
