"""A Hugging Face Hub on this machine: models as mappings from names of files to their bytes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants


class Hub:
    """Models by ``org/name``; and which of their files were asked for."""

    def __init__(self) -> None:
        self.models: dict[str, Mapping[str, bytes]] = {}
        self.gated: set[str] = set()
        self.fetched: set[str] = set()

    def put(self, model: str, folder: Path) -> None:
        """Everything below a folder."""
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self.models[model] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for model, files in self.models.items():
            commit = _sha1(model.encode())
            if path.startswith(f"/api/models/{model}/tree/"):
                entries = [{"type": "file", "path": p, "size": len(b), "oid": _sha1(b)} for p, b in files.items()]
                return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
            if path in (f"/api/models/{model}", f"/api/models/{model}/revision/main"):
                about = {"id": model, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
                return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()
            if path.startswith(f"/{model}/resolve/"):
                if model in self.gated:
                    return 403, {"X-Error-Code": "GatedRepo"}, b""
                file = path.split("/resolve/")[1].partition("/")[2]
                if file in files:
                    self.fetched.add(file)
                    head = {"ETag": f'"{_sha1(files[file])}"', "X-Repo-Commit": commit}
                    return 200, {**head, "X-Linked-Size": str(len(files[file]))}, files[file]
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


@contextmanager
def serving(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What huggingface_hub takes for the Hub; downloads go to `cache`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            code, headers, body = hub.answer(unquote(urlparse(self.path).path))
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
