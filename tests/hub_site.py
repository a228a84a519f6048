"""A small Hugging Face on this machine: as much of its HTTP interface as huggingface_hub asks for when it downloads."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass
class Repo:
    """A repository: a folder, and what is the matter with it."""

    folder: Path
    is_gated: bool = False
    token: str | None = None
    claimed_bytes: int | None = None
    status: int | None = None
    is_cut: bool = False

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())

    def size(self, file: str) -> int:
        return self.claimed_bytes or (self.folder / file).stat().st_size


@dataclass
class Site:
    """What the site has, where it is, and what it was asked for."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[str]:
        """Return the files whose bytes were asked for."""
        return [line.rpartition("/")[2] for line in self.asked if line.startswith("GET ") and "/resolve/" in line]


def serve(site: Site) -> ThreadingHTTPServer:
    """Answer at a free port of this machine until the server is shut down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, has_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.site.asked.append(f"{self.command} {path}")
        match = re.match(r"(?:/api/models)?/([^/]+/[^/]+)(?:/(resolve|revision|tree)/([^/]+)(?:/(.*))?)?$", path)
        repo = self.site.repos.get(match[1]) if match else None
        if match is None or repo is None or repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            self._refuse(401, "RepoNotFound", has_body)
        elif repo.status is not None:
            self._refuse(repo.status, "", has_body)
        elif match[3] not in (None, "main", COMMIT):
            self._refuse(404, "RevisionNotFound", has_body)
        elif match[2] == "resolve":
            self._give(repo, match[4], has_body)
        elif match[2] == "tree":
            files = [{"type": "file", "path": file, "size": repo.size(file), "oid": _etag(file)} for file in repo.files()]
            self._send(json.dumps(files).encode(), has_body)
        else:
            siblings = [{"rfilename": file, "size": repo.size(file), "blobId": _etag(file)} for file in repo.files()]
            self._send(json.dumps({"id": match[1], "sha": COMMIT, "siblings": siblings}).encode(), has_body)

    def _give(self, repo: Repo, file: str, has_body: bool) -> None:
        if repo.is_gated:
            self._refuse(401, "GatedRepo", has_body)
        elif not (repo.folder / file).is_file():
            self._refuse(404, "EntryNotFound", has_body)
        else:
            body = (repo.folder / file).read_bytes()
            self._send(body[: len(body) // 2] if repo.is_cut else body, has_body, {"Content-Length": str(len(body)), "ETag": f'"{_etag(str(repo.folder / file))}"'})

    def _refuse(self, status: int, code: str, has_body: bool) -> None:
        self._send(b"{}", has_body, {"X-Error-Code": code} if code else {}, status)

    def _send(self, body: bytes, has_body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(body)
            self.close_connection = int((headers or {}).get("Content-Length", len(body))) > len(body)


def _etag(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
