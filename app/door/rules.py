"""Decide from a request's head whether it is answered: host and origin, route, size of the headers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

RUN, UPLOAD, HEARTBEAT = "/gradio_api/run/predict", "/gradio_api/upload", "/gradio_api/heartbeat/"
CONFIG, INFO = "/config", "/gradio_api/info"
JOIN, READ, CANCEL = "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/cancel"
MCP = re.compile(r"/gradio_api/mcp/?")
CALL = re.compile(r"/gradio_api/call/(?:v2/)?([a-z]{1,20})(?:/([0-9a-f]{32}))?")
CLIENT = re.compile(r"[a-z0-9-]{1,40}")
"""Gradio's name of a page or of another client."""
ROUTES = {
    "GET": re.compile(
        r"/|/(assets|static)/[^\\]*|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json"
        rf"|/gradio_api/(theme\.css|startup-events|heartbeat/{CLIENT.pattern}|file=[^\\]*)"
        rf"|{CONFIG}|{INFO}|{READ}|{CALL.pattern}"
    ),
    "POST": re.compile(f"{RUN}/?|{UPLOAD}|{JOIN}|{CANCEL}|{CALL.pattern}|{MCP.pattern}"),
}
"""Routes that the page and programs use, found by recording their requests; Gradio has some sixty more, which are closed."""
MOST_HEADERS, HEADERS_BYTES = 100, 32 * 1024
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Refusal(Exception):
    """A request that is not answered: HTTP status, and a sentence for the person who sent it."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Names:
    """Host names under which the page may be asked for."""

    allowed: frozenset[str]

    @classmethod
    def of(cls, *names: str) -> Names:
        """Accept `names`, each a host name with or without a port, and those of this machine."""
        return cls(frozenset(filter(None, (*LOOPBACK, *(host_of(name) for name in names)))))

    def check_host(self, host: str) -> None:
        """Check a request's Host header.

        A page elsewhere can have its own name point to this machine and then read its answers (DNS rebinding). It cannot
        do that with a number, so numeric addresses are always allowed.

        Raises: Refusal.
        """
        name = host_of(host)
        if name not in self.allowed and not _is_number(name):
            raise Refusal(421, "This server is not known under that name: its owner can add it to QUANTSCOPE_HOSTS.")

    def check_origin(self, host: str, origin: str | None, site: str | None, *, is_page: bool) -> None:
        """Check that no other web page sent the request. The page itself may be linked to from anywhere.

        Args:
            host: the Host header. origin, site: the headers Origin and Sec-Fetch-Site, which browsers send.
        Raises: Refusal.
        """
        if origin is not None:
            scheme, _, place = origin.lower().partition("://")
            own = place == host.lower() or (scheme == "https" and place in self.allowed)
            if not own or scheme not in ("http", "https"):
                raise Refusal(403, "Another web page sent this request: open Quantscope itself.")
        elif site not in (None, "same-origin", "none") and not is_page:
            raise Refusal(403, "Another web page sent this request: open Quantscope itself.")


def host_of(text: str) -> str:
    """Return the host name in a Host header or a setting, in lower case without port and brackets; empty if there is none."""
    try:
        return (urlsplit(f"//{text.strip()}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Check the number and size of a request's headers. Raises: Refusal."""
    sizes = [len(name) + len(value) for name, value in headers]
    if len(sizes) > MOST_HEADERS or sum(sizes) > HEADERS_BYTES:
        raise Refusal(431, f"The headers are too long: send at most {MOST_HEADERS}, of {HEADERS_BYTES // 1024} kB together.")


def is_call(path: str) -> bool:
    """Say whether a route is one by which programs call endpoints."""
    return path in (JOIN, READ, CANCEL) or CALL.fullmatch(path) is not None or MCP.fullmatch(path) is not None


def check_route(method: str, path: str) -> None:
    """Check that the page or a program uses this route. Raises: Refusal."""
    allowed = ROUTES.get("GET" if method == "HEAD" else method)
    if method != "POST" and MCP.fullmatch(path):
        raise Refusal(405, "This is a server of MCP without a stream of its own: send messages with POST.")
    if allowed is None or not allowed.fullmatch(path) or len(path) > 2000:
        raise Refusal(404, "There is nothing here.")


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
