"""What the tests of names and of the Hub share: the contract of a refusal."""

from __future__ import annotations

import pytest

from core.errors import ModelError
from core.models.io.catalog import resolve


def refused(name: str, code: str, **options: object) -> ModelError:
    """The sentence with which `resolve` refuses a name; its code is E-MODEL-`code`."""
    with pytest.raises(ModelError) as caught:
        resolve(name, **options)
    assert caught.value.code == f"E-MODEL-{code}" and 20 < len(str(caught.value)) <= 240
    return caught.value
