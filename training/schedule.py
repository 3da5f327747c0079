"""Compute learning rate, weight decay and quantisation mode of each training step, in closed form.

    warm-up      lr(t) = p t / W                                    t = 1 … W - 1, steps count from 1
    decay        lr(t) = e + (p - e) (1 - (t - W) / (T - W))        t = W … T
    peak         p = first peak while t < T/2, second peak from T/2 on: the rate drops at T/2
    weight decay first value while t < T/2, second value (0 in the paper) from T/2 on
    stage 2      from t > S = round(switch T): other input quantisers; with a restart r, lr(t) = r (1 - (t - S) / (T - S))

Source: "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (two-stage rate and weight decay, W = 375, e = 3e-5) and
BitNet a4.8 (arXiv:2411.04965, section 2.3: two-stage activations at 95 % of the tokens). We add the restart: at small
scale the last steps of the decay are too few and too small to adapt to the new quantisers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The schedule for T = `steps`.

    Attributes:
        steps: T. warmup: W, below T.
        peaks: learning rates before and after T/2. end: the rate at T.
        decays: weight decay before and after T/2.
        switch: share of the steps after which stage 2 begins; None: never.
        restart: learning rate at which stage 2 begins, falling to 0; None: the decay goes on.
    """

    steps: int
    warmup: int
    peaks: tuple[float, float]
    end: float = 3e-5
    decays: tuple[float, float] = (0.1, 0.0)
    switch: float | None = None
    restart: float | None = None

    @property
    def switch_step(self) -> int:
        """S: the last step of stage 1 (T without a switch)."""
        return self.steps if self.switch is None else round(self.switch * self.steps)

    def stage(self, step: int) -> int:
        """Return the stage, 1 or 2, of a step of 1 … T."""
        return 1 if step <= self.switch_step else 2

    def lr(self, step: int) -> float:
        """Return the learning rate of a step of 1 … T."""
        if self.stage(step) == 2 and self.restart is not None:
            return self.restart * (1 - (step - self.switch_step) / (self.steps - self.switch_step))
        peak = self.peaks[2 * step >= self.steps]
        if step < self.warmup:
            return peak * step / self.warmup
        return self.end + (peak - self.end) * (1 - (step - self.warmup) / (self.steps - self.warmup))

    def weight_decay(self, step: int) -> float:
        """Return the weight decay of a step of 1 … T."""
        return self.decays[2 * step >= self.steps]
