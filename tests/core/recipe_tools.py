"""What the tests of recipes share: strategies for numbers, and the contract of a refusal."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from core.errors import MAX_MESSAGE, InputError
from core.recipe import PER_CHANNEL, Clusters

BIT = st.sampled_from((2, 3, 4, 5, 6, 7, 8, 16))
CLUSTERS = st.builds(Clusters, *[st.integers(1, PER_CHANNEL)] * 5)


def refused(call, *args: object, code: str | None = None, **options: object) -> InputError:
    """Check the contract of a refusal: one sentence that ends, with a code of the parameters."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert 15 < len(message) <= MAX_MESSAGE and "\n" not in message and message.endswith((".", "…"))
    assert caught.value.code.startswith("E-PARAM-") and caught.value.code == caught.value.code.upper()
    assert code is None or caught.value.code == code
    return caught.value
