"""A local server that accepts uploads like the Hugging Face Hub."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import ModelCard

from tests.servers import COMMIT, FileHandler, FileServer, running, use_as_hub, use_own_caches


class Hub(FileServer):
    """Accept uploads like the Hugging Face Hub, and serve the files afterwards.

    Large files go to a storage of its own, as by Git LFS.

    Attributes:
        token: Token of all requests, except those to the storage.
        private: Whether each repository is private, by id.
        branches: Branches that were created, as ID/NAME.
        storage: Contents of the large files by SHA-256.
        commits: For each commit the repository, the branch, the message and the paths of its files.
        refuses: Status and message by which uploads are refused.
    """

    def __init__(self):
        super().__init__({}, _HubHandler)
        self.token = "hf_abc123"
        self.private: dict[str, bool] = {}
        self.branches: list[str] = []
        self.storage: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, str, list[str]]] = []
        self.refuses: tuple[int, str] | None = None


class _HubHandler(FileHandler):
    server: Hub

    def do_GET(self) -> None:
        if not (found := re.fullmatch(r"/api/models/(\w+/\w+)", urlsplit(self.path).path)):
            return super().do_GET()
        self._authorize(found[0])
        if found[1] not in self.server.private:
            return self._reply(404, {"error": "Repository not found"})
        return self._reply(200, {"id": found[1], "private": self.server.private[found[1]]})

    def do_PUT(self) -> None:
        assert "Authorization" not in self.headers  # The storage is another company's.
        contents = self._body()
        oid = hashlib.sha256(contents).hexdigest()
        assert self.path == f"/storage/{oid}"
        self.server.storage[oid] = contents
        self._reply(200, {})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if not self._authorize(path):
            return None
        if self.server.refuses:
            status, message = self.server.refuses
            return self._reply(status, {"error": message})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            metadata = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            assert isinstance(metadata["tags"], list)
            return self._reply(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/(\w+/\w+)\.git/info/lfs/objects/batch", path):
            assert found[1] in self.server.private
            objects = [self._lfs(wanted) for wanted in json.loads(body)["objects"]]
            return self._reply(200, {"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/(\w+/\w+)/(preupload|commit|branch)/([\w.-]+)", path)
        assert found, path
        repo, action, branch = found.groups()
        assert repo in self.server.private
        if action == "branch":
            self.server.branches.append(f"{repo}/{branch}")
            return self._reply(200, {})
        assert branch == "main" or f"{repo}/{branch}" in self.server.branches
        if action == "preupload":
            files = [self._mode(file["path"]) for file in json.loads(body)["files"]]
            return self._reply(200, {"files": files})
        return self._commit(repo, branch, [json.loads(line) for line in body.splitlines()])

    def _authorize(self, path: str) -> bool:
        self.server.requests.append((self.command, path, None))
        if self.headers["Authorization"] == f"Bearer {self.server.token}":
            return True
        self._reply(401, {"error": "Invalid username or password."})
        return False

    def _create(self, wanted: dict) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if repo in self.server.private else 200
        self.server.private.setdefault(repo, wanted.get("visibility") == "private")
        self._reply(status, {"url": f"{self.server.address}/{repo}"})

    def _mode(self, path: str) -> dict:
        mode = "lfs" if path.endswith((".safetensors", ".pth")) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _lfs(self, wanted: dict) -> dict:
        if wanted["oid"] in self.server.storage:
            return wanted
        upload = {"href": f"{self.server.address}/storage/{wanted['oid']}"}
        return wanted | {"actions": {"upload": upload}}

    def _commit(self, repo: str, branch: str, lines: list[dict]) -> None:
        message = lines[0]["value"]["summary"]
        for line in lines[1:]:
            file = line["value"]
            if line["key"] == "lfsFile":
                contents = self.server.storage[file["oid"]]
            else:
                assert line["key"] == "file"
                contents = base64.b64decode(file["content"])
            self.server.files[f"/{repo}/resolve/{branch}/{file['path']}"] = contents
        paths = [line["value"]["path"] for line in lines[1:]]
        self.server.commits.append((repo, branch, message, paths))
        url = f"{self.server.address}/{repo}/commit/{COMMIT}"
        self._reply(200, {"commitUrl": url, "commitOid": COMMIT})

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, status: int, contents: dict) -> None:
        body = json.dumps(contents).encode()
        self._send(status, {"Content-Type": "application/json"}, body)
        self.wfile.write(body)


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """Use a local hub with an access token, and download to `folder`."""
    use_own_caches(monkeypatch, str(folder))
    # Without Xet, large files are uploaded by Git LFS.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with running(Hub()) as server:
        use_as_hub(monkeypatch, server.address)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def usage(card: Path) -> str:
    """Return the Python code in a model card."""
    [code] = re.findall(r"```python\n(.*?)```", ModelCard.load(card).text, re.DOTALL)
    return code
