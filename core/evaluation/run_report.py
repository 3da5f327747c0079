"""Hold what is estimated of a run before it starts, without the numerical libraries that estimate it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.report import Report


@dataclass(frozen=True, kw_only=True)
class RunEstimate(Report):
    """What a quantisation will take, estimated before it starts (`core.evaluation.run_estimate`).

    Attributes:
        stages: seconds per stage, as `QuantizeReport.stages`; seconds: of all.
        compare_seconds: of measuring the quantised model against the original; original_seconds: of the original alone.
        tokens: calibration tokens. compared: tokens that are measured on.
        memory_bytes: what this process holds now. added_bytes, measuring_bytes: what quantising, and measuring the result, add at
            their peaks. free_bytes: memory that is free now.
        model_bytes: of the saved model's tensors; packed_bytes: of its decoder's matrices with their scales.
        kv_bytes_per_token: of keys and values.
        timing_seconds: what timing one layer took. saved: whether the run was made before and is only loaded.
    """

    stages: dict[str, float]
    seconds: float
    compare_seconds: float
    original_seconds: float
    tokens: int
    compared: int
    memory_bytes: int
    added_bytes: int
    measuring_bytes: int
    free_bytes: int
    model_bytes: int
    packed_bytes: int
    kv_bytes_per_token: int
    timing_seconds: float
    saved: bool = False

    def peak_bytes(self, *, measured: bool) -> int:
        """Return the memory of this process at the peak of the run, with or without measuring it."""
        return self.memory_bytes + max(self.added_bytes, self.measuring_bytes * measured)

    def lacking_bytes(self, *, measured: bool) -> int:
        """Return how much memory is missing; 0 where all that comes on top is free."""
        return max(0, self.peak_bytes(measured=measured) - self.memory_bytes - self.free_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and both peaks as JSON types."""
        peaks = {"peak_bytes": self.peak_bytes(measured=False), "measured_peak_bytes": self.peak_bytes(measured=True)}
        return super().to_dict() | peaks
