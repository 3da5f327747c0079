"""Check, time and compare the jobs of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from benchmarks.common import Result
from kernels import Backend, _triton

L2 = 64 * 2**20
ROUNDS = 15


@dataclass(frozen=True)
class Job:
    """One comparison.

    Attributes:
        ours, peers: called with the number of a copy of the inputs.
        copies: number of copies of the inputs.
        expected: the exact result for copy 0, or None where `ours` has no single output to compare.
        packages: further peers by package, as functions that build the call. captured: whether calls can be CUDA graphs.
        bytes, operations: what the job must move, and compute in `rate` ("int8" or "bfloat16"); the slower one is the limit.
    """

    name: str
    ours: Callable[[int], object]
    peers: dict[str, Callable[[int], object]]
    copies: int = 1
    expected: Callable[[], Tensor] | None = None
    bytes: float = 0.0
    operations: float = 0.0
    rate: str = "int8"
    target: str = ""
    packages: dict[str, Callable[[], Callable[[int], object]]] = field(default_factory=dict)
    captured: bool = True


class Machine:
    """The device of the jobs, the backend of our kernels, and the number of copies of inputs that exceed the cache."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.backend = Backend.TRITON if self.cuda or _triton.interpreting() else Backend.REFERENCE
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.rates = self._rates() if self.cuda else {}

    def copies(self, bytes_each: float) -> int:
        """Count the copies of inputs of this size that exceed L2 four times, at most 64."""
        return max(1, min(64, int(4 * L2 // max(bytes_each, 1)) + 1)) if self.cuda else 1

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw normal numbers on the device."""
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Draw integers in [low, high) on the device."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device).to(dtype)

    def _rates(self) -> dict[str, float]:
        source = torch.empty(2**28, device="cuda", dtype=torch.int8).random_(-8, 8)
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        i, j = (torch.randint(-8, 8, (8192, 8192), device="cuda").to(torch.int8) for _ in range(2))
        found = measure([lambda: target.copy_(source), lambda: torch.mm(a, b.t()), lambda: torch._int_mm(i, j.t())])
        return {"copy": 2 * source.numel() / found[0], "bfloat16": 2 * 8192**3 / found[1], "int8": 2 * 8192**3 / found[2]}

    def limit(self, job: Job) -> float:
        """Compute the seconds that the job takes at the measured rates."""
        return max(job.bytes / self.rates["copy"], job.operations / self.rates[job.rate])


def measure(functions: list[Callable[[], object]], *, captured: bool = True) -> list[float]:
    """Measure the median seconds of each function in turn, as captured graphs where `captured` (else three rounds of calls)."""
    runs = [_captured(function) for function in functions] if captured else functions
    rounds = ROUNDS if captured else 3
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for slot, run in zip(times, runs, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            slot.append(begin.elapsed_time(end) / 1e3)
    return [median(slot) for slot in times]


def _captured(function: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def error(found: Tensor, exact: Tensor) -> float:
    """Compute the relative error in the norm."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def run_job(job: Job, machine: Machine) -> list[Result]:
    """Check, time and compare one job."""
    note = ""
    if job.expected is not None:
        note = f"error {error(job.ours(0), job.expected()):.1e}"
    else:
        job.ours(0)
    if not machine.cuda:
        for peer in job.peers.values():
            peer(0)
        note = "; ".join(filter(None, ("not measured yet: no GPU", note)))
        peers = [Result(job.name, None, peer, job.target, note=note) for peer in job.peers]
        return peers + [Result(job.name, None, peer, note="not measured yet: no GPU") for peer in job.packages]
    packages, untimed = _packages(job)
    peers = job.peers | packages

    def repeated(function: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [function(i) for i in range(job.copies)]

    ours, *others = (t / job.copies for t in measure([repeated(f) for f in (job.ours, *peers.values())], captured=job.captured))
    fraction = machine.limit(job) / ours if job.bytes or job.operations else None
    results = [
        Result(job.name, seconds / ours, peer, job.target if i == 0 else "", ours, note=note, limit_fraction=fraction)
        for i, (peer, seconds) in enumerate(zip(peers, others, strict=True))
    ]
    return results + untimed


def _packages(job: Job) -> tuple[dict[str, Callable[[int], object]], list[Result]]:
    """Return the further peers that run, and a line for each that does not. A package that fails does not end the run."""
    found, missing = {}, []
    for name, build in job.packages.items():
        try:
            call = build()
            call(0)
            if job.captured:
                _captured(lambda call=call: call(0))
            torch.cuda.synchronize()
            found[name] = call
        except ImportError:
            missing.append(Result(job.name, None, name, note="not measured: not installed"))
        except Exception as error:  # noqa: BLE001 - foreign code can raise anything
            missing.append(Result(job.name, None, name, note=f"not measured: {type(error).__name__} {str(error)[:80]}"))
    return found, missing
