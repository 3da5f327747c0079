"""The headers of every answer: what a browser may do with it, and what the page may load."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]
COMMON: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
]
FILE_POLICY = b"default-src 'none'; frame-ancestors 'none'; sandbox"
"""Policy of every answer but the page: should a browser show it as a document, it can run and load nothing."""
INLINE = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)


def with_security(headers: Iterable[tuple[bytes, bytes]], policy: bytes = FILE_POLICY) -> Headers:
    """Add the headers of security, and remove those by which Gradio lets every other page read the answer."""
    kept = [(name, value) for name, value in headers if not name.lower().startswith(b"access-control-")]
    return [*kept, *COMMON, (b"content-security-policy", policy)]


def page_policy(html: bytes, *, frames: str) -> bytes:
    """Return the content-security policy of the page.

    Its own inline scripts are allowed by their hash, so that text that gets into the page runs nothing. Two exceptions are
    Gradio's: it makes functions from the `js` of events and components ('unsafe-eval'), and it sets styles on elements.

    Args:
        html: the page. frames: sources that may show the page in a frame.
    """
    digests = dict.fromkeys(base64.b64encode(hashlib.sha256(script).digest()).decode() for script in INLINE.findall(html))
    scripts = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src 'self' 'unsafe-eval' {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; manifest-src 'self'; "
        f"base-uri 'self'; form-action 'none'; frame-ancestors {frames}"
    ).encode()
