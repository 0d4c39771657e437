"""A small hub on localhost, with as much of the Hugging Face hub's interface as fetching and pushing use."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from varestorer.weights.releases import published_files


class Hub:
    """Repositories in memory.

    Attributes:
        url: where it answers.
        commits: repository -> commit -> file -> its bytes; the last commit is `main`.
        asked: requests, as `GET /path`.
        breaks: file -> how many more of its transfers break off in the middle.
        spoiled: files whose bytes come changed.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.breaks: dict[str, int] = {}
        self.spoiled: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("OurHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def commit(self, repository: str, files: dict[str, bytes | Path]) -> str:
        """Add a commit that holds these files; returns its name."""
        content = {name: file.read_bytes() if isinstance(file, Path) else file for name, file in files.items()}
        kept = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository}{len(kept)}".encode()).hexdigest()
        kept[commit] = content
        return commit

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """A commit and its files."""
        commits = self.commits[repository]
        commit = list(commits)[-1] if revision == "main" else revision
        return commit, commits[commit]

    @property
    def transfers(self) -> list[str]:
        """Names of the files that were fetched, as often as they were."""
        return [Path(line).name for line in self.asked if line.startswith("GET") and "/resolve/" in line]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""

    def answer(self, content: object = b"", status: int = 200, **headers: str) -> None:
        """The whole of an answer."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:  # noqa: N802
        self.hub.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        try:
            if found := re.fullmatch(r"/(\S+?/\S+?)/resolve/([^/]+)/(\S+)", path):
                self.send_file(found[1], found[2], found[3])
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                commit, files = self.hub.files(found[1], found[2] or "main")
                siblings = [{"rfilename": name} for name in files]
                self.answer({"id": found[1], "sha": commit, "siblings": siblings})
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                _, files = self.hub.files(found[1], found[2])
                self.answer([{"type": "file", "path": n, "size": len(b), "oid": git_oid(b)} for n, b in files.items()])
            else:
                self.answer(status=404)
        except KeyError as error:
            is_repository = "/" in str(error)
            self.answer(status=404, X_Error_Code="RepoNotFound" if is_repository else "RevisionNotFound")

    do_HEAD = do_GET  # noqa: N815

    def send_file(self, repository: str, revision: str, name: str) -> None:
        """A file or a part of it; what ends in json is small and known by git's hash, all else by SHA-256."""
        commit, files = self.hub.files(repository, revision)
        if name not in files:
            self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        body = files[name]
        digest = git_oid(body) if name.endswith((".json", ".md")) else hashlib.sha256(body).hexdigest()
        if name in self.hub.spoiled:
            body = body[:-1] + bytes([body[-1] ^ 1])
        start = int(re.sub(r"\D", "", self.headers.get("Range") or "0"))
        headers = {"ETag": f'"{digest}"', "X_Repo_Commit": commit, "X_Linked_Size": str(len(body))}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command == "GET" and self.hub.breaks.get(name, 0):
            self.hub.breaks[name] -= 1
            self.send_response(206 if start else 200)
            for key, value in (headers | {"Content-Length": str(len(body) - start)}).items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body[start : start + (len(body) - start) // 2])
            self.close_connection = True
            return
        self.answer(body[start:], 206 if start else 200, **headers)

    def do_POST(self) -> None:  # noqa: N802
        """Creating a repository, and a commit: all files come inside it or by LFS."""
        self.hub.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'someone'}/{given['name']}"
            self.hub.commits.setdefault(name, {})
            self.answer({"url": f"{self.hub.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path.partition("?")[0]):
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.uploads[value["oid"]]
            commit = self.hub.commit(found[1], files)
            self.answer({"commitUrl": f"{self.hub.url}/{found[1]}/commit/{commit}", "commitOid": commit})
        else:
            self.answer(status=404)

    def do_PUT(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == Path(self.path).name
        self.hub.uploads[Path(self.path).name] = body
        self.answer()


def git_oid(body: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub of this process, and of those that it starts, takes for the hub; its cache is new."""
    from huggingface_hub import constants

    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    cache = folder / "hub_cache"
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()


def publish(hub: Hub, folder: Path) -> None:
    """Every published file that lies in the folder, where `weights.lock` says that it is."""
    by_hub: dict[str, dict[str, bytes | Path]] = {}
    for name, file in published_files().items():
        if (folder / name).is_file():
            by_hub.setdefault(file.hub, {})[file.path] = folder / name
    for name, files in by_hub.items():
        hub.commit(name, files)
