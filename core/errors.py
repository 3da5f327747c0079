"""All expected errors, as one small tree of types.

    QuantscopeError            base: one sentence for the user, one stable code
    ├── InputError             a parameter is out of its range           E-PARAM-<FIELD>
    ├── ModelError             a model cannot be found, read or adapted  E-MODEL-<REASON>
    ├── TextError              a text is too short, too long, unreadable E-TEXT-<REASON>
    ├── NumericError           NaN or infinity where numbers must be     E-NUM-<REASON>
    ├── BackendError           an explicitly requested backend cannot run E-BACKEND
    ├── ResourceError          memory, disk or time ran out              E-MEM, E-DISK, E-TIME
    ├── ArtifactError          a saved folder is incomplete or damaged   E-CKPT-<REASON>
    └── Cancelled              the user pressed Stop                     E-CANCEL

A message states what happened with the offending value, the rule, and what to do now, in plain text of at most
240 characters: it is shown as it is in the page and on stderr.
"""

from __future__ import annotations

MAX_MESSAGE = 240


class QuantscopeError(Exception):
    """Base of all expected errors. `str(error)` is the sentence for the user, `error.code` a stable identifier."""

    code = "E-BUG"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        message = " ".join(str(message).split())
        if len(message) > MAX_MESSAGE:
            message = message[: MAX_MESSAGE - 1].rstrip() + "…"
        super().__init__(message)
        self.code = code or type(self).code

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), str(self), self.code)


def _rebuild(kind: type[QuantscopeError], message: str, code: str) -> QuantscopeError:
    """Rebuild an error from its class, sentence and code, after it was sent from the worker process to the page."""
    return kind(message, code=code)


class InputError(QuantscopeError):
    """A parameter breaks its rule."""

    code = "E-PARAM"


class ModelError(QuantscopeError):
    """A model cannot be found, read or adapted."""

    code = "E-MODEL"


class TextError(QuantscopeError):
    """A calibration or evaluation text is unusable."""

    code = "E-TEXT"


class NumericError(QuantscopeError):
    """NaN or infinity where finite numbers are required."""

    code = "E-NUM"


class BackendError(QuantscopeError):
    """A backend asked for by name cannot run here."""

    code = "E-BACKEND"


class ResourceError(QuantscopeError):
    """Memory, disk or time ran out."""

    code = "E-MEM"


class ArtifactError(QuantscopeError):
    """A saved folder is incomplete, damaged or of another kind."""

    code = "E-CKPT-BAD"


class Cancelled(QuantscopeError):
    """The user asked to stop."""

    code = "E-CANCEL"

    def __init__(
        self, message: str = "Stopped. Nothing was kept; earlier results are still there.", *, code: str | None = None
    ) -> None:
        super().__init__(message, code=code)
