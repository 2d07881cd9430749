"""A hub on this machine: an HTTP server with the endpoints that a push and a download use, and everything they got."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_good"


@dataclass
class Repository:
    """Commits are (id, name -> bytes); a branch names the last of its own."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        commit = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        self.messages.append(message)
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@contextmanager
def reached_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub at which this process is logged in, with its cache in that folder."""
    hub = Hub()
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(folder / "hub-cache"),
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,  # the server speaks the older LFS protocol, which is what remains without hf-xet
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_TOKEN_PATH": str(folder / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()


class Hub:
    """Answers on `url`; `repositories` is what it holds, `requests` the (method, path) it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        """Beginning of a path -> status and message with which it is answered."""
        self.before_commit: Any = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                pieces = []
                while size := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)

            def answer(self) -> None:
                body = self.body()
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                status, headers, content = hub.answer(self.command, path, body, self.headers.get("Authorization"))
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, dict[str, str], bytes]:
        for start, (status, message) in self.refuse.items():
            if path.startswith(start):
                return status, {"X-Error-Message": message}, json.dumps({"error": message}).encode()
        if path.startswith("/lfs/") and method == "PUT":  # a signed address: no token
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.large[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        if method != "GET" and method != "HEAD" and token != f"Bearer {TOKEN}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.repositories:
            return self._model(self.repositories["/".join(parts[2:4])], "/".join(parts[2:4]), parts[4:], body)
        if len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[:2]) in self.repositories:
            return self._resolve(self.repositories["/".join(parts[:2])], parts[3], "/".join(parts[4:]))
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        repo_id = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repositories:
            return _json(address | {"error": "You already created this model repo"}, 409)
        repository = self.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return _json(address)

    def _validate(self, content: str) -> tuple[int, dict[str, str], bytes]:
        head = yaml.safe_load(content.split("---\n")[1])
        errors = [] if isinstance(head, dict) and head.get("license") != "bad" else [{"message": '"license" is wrong'}]
        return _json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _batch(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        objects = [
            one
            | ({} if one["oid"] in self.large else {"actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}})
            for one in asked["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    def _model(
        self, repository: Repository, repo_id: str, what: list[str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        kind, revision = (what[0], what[1]) if len(what) > 1 else ("revision", "main")
        if kind == "branch":
            if revision in repository.branches:
                return _json({"error": "exists"}, 409)
            repository.branches[revision] = repository.branches["main"]
            return _json({})
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = repository.commits[commit]
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            return _json({"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings})
        if kind == "tree":
            return _json([{"type": "file", "path": n, "size": len(b), "oid": _git_hash(b)} for n, b in files.items()])
        if kind == "preupload":
            return _json({"files": [self._mode(one, files) for one in json.loads(body)["files"]]})
        assert kind == "commit"
        return self._commit(repository, repo_id, revision, [json.loads(line) for line in body.splitlines()])

    def _mode(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        name = asked["path"]
        large = name.endswith(".safetensors") or asked["size"] > 10_000_000
        content = files.get(name)
        oid = None if content is None else hashlib.sha256(content).hexdigest() if large else _git_hash(content)
        return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _commit(
        self, repository: Repository, repo_id: str, branch: str, lines: list[dict[str, Any]]
    ) -> tuple[int, dict[str, str], bytes]:
        if self.before_commit is not None:
            self.before_commit(repository)
        header, *changes = lines
        if header["value"].get("parentCommit") not in (None, repository.branches[branch]):
            return _json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        files = dict(repository.files(branch))
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                assert change["key"] == "deletedFile"
                del files[value["path"]]
        commit = repository.commit(branch, files, header["value"]["summary"])
        return _json({"commitUrl": f"{self.url}/{repo_id}/commit/{commit}", "commitOid": commit})

    def _resolve(self, repository: Repository, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        commit = repository.branches.get(revision, revision)
        content = repository.commits[commit].get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}, content


def _json(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
