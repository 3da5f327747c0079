"""A stand-in for the Hub on 127.0.0.1: one repository's files, and the ways a Hub can fail."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAULTS = {"gated": (403, "GatedRepo"), "missing": (401, "RepoNotFound"), "revision": (404, "RevisionNotFound"),
          "broken": (500, ""), "busy": (503, "")}


@dataclass
class FakeHub:
    """`files`: name → content of `owner/name`. `fault`: None, a key of FAULTS, "stall", "nonsense", "gated later",
    "corrupt" or "break". `requests`: (method, path, headers) of each request."""

    files: dict[str, bytes]
    fault: str | None = None
    gated: object = False
    private: bool = False
    address: str = ""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def info(self) -> dict:
        """What /api/models answers."""
        siblings = [{"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                    | ({"lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}}
                       if name.endswith((".safetensors", ".bin")) else {})
                    for name, data in self.files.items()]
        return {"id": "owner/name", "modelId": "owner/name", "sha": COMMIT, "private": self.private, "tags": [],
                "gated": self.gated, "disabled": False, "siblings": siblings, "downloads": 0, "likes": 0}


@contextlib.contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run the stand-in; `hub.address` is its endpoint."""
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append((self.command, self.path, dict(self.headers)))
            is_file = "/resolve/" in self.path
            fault = hub.fault
            if fault == "stall":
                time.sleep(5)
            if fault == "gated later":
                fault = "gated" if is_file else None
            if fault in FAULTS:
                status, code = FAULTS[fault]
                self.reply(status, b"{}", {"X-Error-Code": code} if code else {})
            elif fault == "nonsense":
                self.reply(200, b'{"id": 3, "siblings": "no"}', {"Content-Type": "application/json"})
            elif is_file:
                self.reply_file(re.sub(r".*/resolve/[^/]+/", "", self.path))
            elif self.path.startswith("/api/models/owner/name"):
                self.reply(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
            else:
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def reply_file(self, name: str) -> None:
            data = hub.files.get(name)
            if data is None:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT,
                       "X-Linked-Size": str(len(data))}
            if hub.fault == "corrupt" and name.endswith(".safetensors"):
                data = data[:-1] + b"X"
            if hub.fault == "break" and name.endswith(".safetensors") and self.command == "GET":
                self.reply(200, data[:len(data) // 2], headers, length=len(data))
                self.close_connection = True
                return None
            return self.reply(200, data, headers)

        def reply(self, status: int, body: bytes, headers: dict[str, str], *, length: int | None = None) -> None:
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
