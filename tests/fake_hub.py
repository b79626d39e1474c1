"""A Hub in memory, as far as `push_to_hub` and `from_pretrained` of models ask for: plain uploads and LFS over HTTP."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

REPOSITORY = r"([^/]+/[^/]+)"
BIG = (".safetensors", ".bin", ".pt", ".pth", ".onnx")


class FakeHub:
    """Serves on the loopback address from its construction to `close`.

    Attributes:
        files: Of each repository, content by path.
        pushes: Messages of the commits of each repository.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.pushes: dict[str, list[str]] = {}
        self._large: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            def answer(self, body: bytes) -> None:
                hub._route(self, unquote(urlparse(self.path).path), body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables of a process that shall take this for the Hub."""
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_fake", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return os.environ | settings | {"HF_HOME": str(cache)}

    def _route(self, request: "_Handler", path: str, body: bytes) -> None:
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"/api/whoami-v2", self._who),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda request, body: request.send({"errors": [], "warnings": []})),
            (rf"/api/models/{REPOSITORY}/preupload/.+", self._preupload),
            (rf"/{REPOSITORY}\.git/info/lfs/objects/batch", self._large_files),
            (r"/_large/([0-9a-f]{64})", self._upload),
            (rf"/api/models/{REPOSITORY}/commit/.+", self._commit),
            (rf"/api/models/{REPOSITORY}(?:/revision/[^/]+)?", self._describe),
            (rf"/api/models/{REPOSITORY}/tree/[^/]+.*", self._tree),
            (rf"/{REPOSITORY}/resolve/[^/]+/(.+)", self._download),
        ]
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, path):
                return answer(request, body, *match.groups())
        return request.fail("EntryNotFound")

    def _who(self, request: "_Handler", body: bytes) -> None:
        token = {"accessToken": {"role": "write", "displayName": "test"}}
        request.send({"name": "me", "type": "user", "orgs": [], "auth": token})

    def _create(self, request: "_Handler", body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.files else 200
        self.files.setdefault(name, {})
        self.pushes.setdefault(name, [])
        request.send({"url": f"{self.url}/{name}"}, status)

    def _preupload(self, request: "_Handler", body: bytes, name: str) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(BIG) else "regular" for path in paths]
        plain = {"shouldIgnore": False, "oid": None}
        files = [{"path": path, "uploadMode": mode} | plain for path, mode in zip(paths, modes, strict=True)]
        request.send({"files": files})

    def _large_files(self, request: "_Handler", body: bytes, name: str) -> None:
        objects = [
            {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            | {"actions": {"upload": {"href": f"{self.url}/_large/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        request.send({"transfer": "basic", "objects": objects})

    def _upload(self, request: "_Handler", body: bytes, checksum: str) -> None:
        self._large[checksum] = body
        request.send({})

    def _commit(self, request: "_Handler", body: bytes, name: str) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.pushes[name].append(value["summary"])
            elif entry["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[name][value["path"]] = self._large[value["oid"]]
            elif entry["key"] == "deletedFile":
                self.files[name].pop(value["path"], None)
        commit = self._revision(name)
        urls = {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit}
        request.send(urls | {"hookOutput": "", "success": True})

    def _revision(self, name: str) -> str:
        return hashlib.sha1(
            b"".join(path.encode() + self.files[name][path] for path in sorted(self.files[name]))
        ).hexdigest()

    def _describe(self, request: "_Handler", body: bytes, name: str) -> None:
        if name not in self.files:
            return request.fail("RepoNotFound")
        facts = {"id": name, "modelId": name, "sha": self._revision(name), "private": False, "tags": []}
        return request.send(facts | {"siblings": [{"rfilename": path} for path in self.files[name]]})

    def _tree(self, request: "_Handler", body: bytes, name: str) -> None:
        if name not in self.files:
            return request.fail("RepoNotFound")
        entries = [{"type": "file", "path": path, "size": len(file)} for path, file in self.files[name].items()]
        sums = [{"oid": hashlib.sha1(file).hexdigest()} for file in self.files[name].values()]
        return request.send([entry | oid for entry, oid in zip(entries, sums, strict=True)])

    def _download(self, request: "_Handler", body: bytes, name: str, path: str) -> None:
        if name not in self.files:
            return request.fail("RepoNotFound")
        if path not in self.files[name]:
            return request.fail("EntryNotFound")
        file = self.files[name][path]
        tags = {"ETag": f'"{hashlib.sha1(file).hexdigest()}"', "X-Repo-Commit": self._revision(name)}
        return request.send(file, headers=tags | {"Accept-Ranges": "bytes"})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes) -> None:
        raise NotImplementedError

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _any(self) -> None:
        self.answer(self._body())

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, code: str) -> None:
        self.send({"error": code}, 404, {"X-Error-Code": code})
