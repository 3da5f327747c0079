"""Say who sends the current request: the browser, by its cookie, and the network address.

The gate sets `VISITOR` for each request; handlers and the tasks that they start inherit it, as context variables do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

COOKIE = "quantscope"
VALUE = re.compile(r"[\w-]{43}", re.ASCII)


@dataclass(frozen=True)
class Visitor:
    """The sender of a request.

    Attributes:
        browser: value of the page's cookie, 256 random bits as text; empty for a request without one.
        address: the network that the request comes from: an IPv4 address, or the first 64 bits of an IPv6 address.
    """

    browser: str = ""
    address: str = "local"


VISITOR: ContextVar[Visitor] = ContextVar("visitor")
LOCAL = Visitor("this process")


def visitor() -> Visitor:
    """Return the sender of the current request; outside of one, this process itself."""
    return VISITOR.get(LOCAL)


class Heartbeats:
    """Pages that are open: each holds a request open as long as it lives, which is its heartbeat."""

    def __init__(self) -> None:
        self._beating: Counter[tuple[str, str]] = Counter()

    def open(self, browser: str, page: str) -> bool:
        """Say whether a browser has a page open. `page`: Gradio's name for it."""
        return (browser, page) in self._beating

    @contextlib.contextmanager
    def beat(self, page: str) -> Iterator[None]:
        """Mark a page of the current visitor as open for the time of its request."""
        key = (visitor().browser, page)
        self._beating[key] += 1
        try:
            yield
        finally:
            self._beating[key] -= 1
            if not self._beating[key]:
                del self._beating[key]


def browser_of(cookies: str) -> str:
    """Return the page's cookie in a Cookie header, or an empty string if there is none of its form."""
    try:
        found = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None and VALUE.fullmatch(found.value) else ""


def new_cookie(*, embedded: bool) -> str:
    """Make a Set-Cookie header with a new random value, hidden from scripts.

    Args:
        embedded: whether the page is shown in a frame of another site over https, as a Space is.
    """
    place = "SameSite=None; Secure; Partitioned" if embedded else "SameSite=Lax"
    return f"{COOKIE}={secrets.token_urlsafe(32)}; Path=/; HttpOnly; {place}"


def is_private(address: str) -> bool:
    """Say whether an address belongs to a private network or this machine; text that is no address does not count as one."""
    try:
        return not ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def network_of(address: str) -> str:
    """Return the network that counts as one visitor's: the address, or an IPv6 address's first 64 bits; text else, cut."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:45]
    if found.version == 4:
        return str(found)
    return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))


def address_of(peer: str, forwarded: str, *, behind_proxy: bool) -> str:
    """Return the network of a request's sender.

    A Space is reached through its platform's proxies, which append the address they see to `X-Forwarded-For`: there the last
    entry that is public is used, as entries before it may be invented. Elsewhere the header says nothing.

    Args:
        peer: address at the other end of the connection, as uvicorn gives it. forwarded: the header's value.
    """
    if behind_proxy:
        entries = [entry.strip() for entry in forwarded.split(",")]
        peer = next((entry for entry in reversed(entries) if _is_public(entry)), peer)
    return network_of(peer)


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
