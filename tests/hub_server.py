"""A stand-in for the HuggingFace Hub on loopback: the part of its HTTP API that pushing and loading models uses.

Clients are pointed at it with `HF_ENDPOINT`. It speaks the wire format of the Hub, so everything between
`push_to_hub` and `from_pretrained` is the code that users run: repositories, commits with regular and LFS files,
model information, and downloads at a branch or a commit.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER = "tester"
TOKEN = "hf_only_for_the_stand_in"
_BRANCH = "main"
# What the Hub keeps in large file storage, among the files that a model repository holds.
_LFS_ENDINGS = (".safetensors", ".bin")


class HubError(Exception):
    """An answer other than success, with the code by which `huggingface_hub` picks its exception."""

    def __init__(self, status: HTTPStatus, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class StoredFile:
    """One version of a file; its content lies in the server's folder under the SHA-256."""

    sha256: str
    git_oid: str
    size: int
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Repository:
    """Commits by their id, oldest first; every commit maps the paths it holds to file versions."""

    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        """The commit that a branch or commit name stands for."""
        if revision == _BRANCH:
            return next(reversed(self.commits))
        if revision not in self.commits:
            raise HubError(HTTPStatus.NOT_FOUND, f"there is no revision {revision!r}", "RevisionNotFound")
        return revision

    def commit(self, files: dict[str, StoredFile]) -> str:
        """Add a commit and return its id."""
        content = json.dumps([len(self.commits), sorted((path, f.sha256) for path, f in files.items())])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        return oid


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        endpoint: its address, the value for `HF_ENDPOINT`.
        unknown: requests it had no answer for, as "METHOD path".
    """

    def __init__(self, folder: Path) -> None:
        self.unknown: list[str] = []
        self._folder = folder
        self._repositories: dict[str, Repository] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_class(self))
        # Closing waits for the threads of open requests, so that no socket outlives a test.
        self._server.daemon_threads = False
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = _BRANCH) -> list[str]:
        """Paths in a repository, sorted."""
        repository = self.repository(repo_id)
        return sorted(repository.commits[repository.resolve(revision)])

    def read(self, repo_id: str, path: str, revision: str = _BRANCH) -> bytes:
        """Content of one file of a repository."""
        return self.blob(self.find(repo_id, path, revision)[1].sha256)

    # What the request handler needs

    def create(self, repo_id: str) -> None:
        with self._lock:
            if repo_id in self._repositories:
                raise HubError(HTTPStatus.CONFLICT, "You already created this model repo")
            self._repositories[repo_id] = repository = Repository()
            repository.commit({})

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self._repositories:
            raise HubError(HTTPStatus.NOT_FOUND, f"there is no repository {repo_id!r}", "RepoNotFound")
        return self._repositories[repo_id]

    def find(self, repo_id: str, path: str, revision: str) -> tuple[str, StoredFile]:
        """Commit id and version of a file."""
        repository = self.repository(repo_id)
        oid = repository.resolve(revision)
        if path not in repository.commits[oid]:
            raise HubError(HTTPStatus.NOT_FOUND, f"{repo_id} has no file {path!r}", "EntryNotFound")
        return oid, repository.commits[oid][path]

    def blob(self, sha256: str) -> bytes:
        return self._path(sha256).read_bytes()

    def has_blob(self, sha256: str) -> bool:
        return self._path(sha256).is_file()

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self._path(sha256).write_bytes(content)
        return sha256

    def commit(self, repo_id: str, lines: list[dict[str, Any]]) -> str:
        """Apply the operations of one commit request."""
        with self._lock:
            repository = self.repository(repo_id)
            files = dict(repository.commits[repository.resolve(_BRANCH)])
            for line in lines:
                value = line["value"]
                match line["key"]:
                    case "header":
                        continue
                    case "file":
                        files[value["path"]] = self._stored(base64.b64decode(value["content"]), is_lfs=False)
                    case "lfsFile" if self.has_blob(value["oid"]):
                        files[value["path"]] = self._stored(self.blob(value["oid"]), is_lfs=True)
                    case key:
                        raise HubError(HTTPStatus.BAD_REQUEST, f"cannot apply {key} to {value.get('path')!r}")
            return repository.commit(files)

    def _stored(self, content: bytes, *, is_lfs: bool) -> StoredFile:
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return StoredFile(self.store(content), git_oid, len(content), is_lfs)

    def _path(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise HubError(HTTPStatus.BAD_REQUEST, f"{sha256!r} is not a SHA-256")
        return self._folder / sha256


class _Handler(BaseHTTPRequestHandler):
    """Answers one request, by the table at the end of this class."""

    hub: HubServer
    body: bytes
    # A client that opens a connection and says nothing must not keep the server from closing.
    timeout = 30

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the tests report what matters."""

    def _answer(self) -> None:
        # The body is read before anything can fail: closing with unread data would reset the client's connection.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, function in self._routes:
                if verb == method and (match := re.fullmatch(pattern, path)):
                    return function(self, **match.groupdict())
            self.hub.unknown.append(f"{self.command} {path}")
            raise HubError(HTTPStatus.NOT_FOUND, f"the stand-in does not know {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send_json({"error": str(error)}, error.status, headers)

    def _send(self, content: bytes, headers: dict[str, str], status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}), status)

    def _require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(HTTPStatus.UNAUTHORIZED, "writing needs the token")

    # Writing

    def _create(self) -> None:
        self._require_token()
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        try:
            self.hub.create(repo_id)
        except HubError as error:
            # Clients that accept an existing repository read its address from the refusal.
            return self._send_json({"error": str(error), "url": url}, error.status)
        return self._send_json({"url": url, "name": repo_id, "id": repo_id})

    def _validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        metadata = re.match(r"---\r?\n(.*?)\r?\n---", content, flags=re.DOTALL)
        try:
            valid = metadata is not None and isinstance(yaml.safe_load(metadata[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "the metadata of README.md is not a YAML mapping"}]
        self._send_json({"errors": errors, "warnings": []}, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)

    def _preupload(self, repo: str, revision: str) -> None:
        self._require_token()
        self.hub.repository(repo).resolve(revision)
        self._send_json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(_LFS_ENDINGS) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def _lfs_batch(self, repo: str) -> None:
        self._require_token()
        self.hub.repository(repo)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(self.body)["objects"]]
        for item in objects:
            if not self.hub.has_blob(item["oid"]):
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        self._send_json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, "the content does not have the SHA-256 that was announced")
        self.hub.store(self.body)
        self._send(b"", {})

    def _commit(self, repo: str, revision: str) -> None:
        self._require_token()
        if revision != _BRANCH:
            raise HubError(HTTPStatus.NOT_FOUND, f"there is no branch {revision!r}", "RevisionNotFound")
        oid = self.hub.commit(repo, [json.loads(line) for line in self.body.splitlines()])
        self._send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"})

    # Reading

    def _info(self, repo: str, revision: str | None = None) -> None:
        oid = self.hub.repository(repo).resolve(revision or _BRANCH)
        self._send_json(
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": oid,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in self.hub.files(repo, oid)],
            }
        )

    def _tree(self, repo: str, revision: str) -> None:
        files = [(path, self.hub.find(repo, path, revision)[1]) for path in self.hub.files(repo, revision)]
        entries = [
            {"type": "file", "path": path, "oid": file.etag, "size": len(self.hub.blob(file.sha256))}
            for path, file in files
        ]
        self._send_json(entries)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        commit, file = self.hub.find(repo, path, revision)
        # The Hub sends large files from another host. Here they come from the same one, without a redirect.
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "none"}
        self._send(self.hub.blob(file.sha256), headers)

    _REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
    _REVISION = r"(?P<revision>[\w.-]+)"
    _routes: tuple[tuple[str, str, Callable[..., None]], ...] = (
        ("POST", r"/api/repos/create", _create),
        ("POST", r"/api/validate-yaml", _validate_yaml),
        ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _preupload),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _lfs_upload),
        ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _commit),
        ("GET", rf"/api/models/{_REPO}(/revision/{_REVISION})?", _info),
        ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}", _tree),
        ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
    )


def _handler_class(hub: HubServer) -> type[_Handler]:
    """The handler bound to one server: http.server instantiates the class itself."""
    return type("HubRequestHandler", (_Handler,), {"hub": hub})
