"""Check this installation: versions against the tested ranges, and which backends run here.

The tested ranges are read from `requirements.txt`.
`packages` and `summary` read package metadata only; `backends` imports torch.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from core.baselines.registry import BASELINES, installed_version
from core.errors import ResourceError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
PYTHON = ">=3.11,<3.13"


@dataclass(frozen=True)
class PackageCheck:
    """One package of the requirements.

    Attributes:
        version: installed version, None if the package is missing.
        tested: range of versions that the tests cover, as pip writes ranges; "" for any.
        ok: whether `version` lies in `tested`.
    """

    name: str
    version: str | None
    tested: str
    ok: bool


@dataclass(frozen=True)
class BackendCheck:
    """One backend of the linear layers, or one baseline: what it is, or why it cannot run here."""

    name: str
    runs: bool
    reason: str


@dataclass(frozen=True)
class DoctorReport:
    """Everything that `python -m app.cli doctor` prints."""

    packages: list[PackageCheck]
    backends: list[BackendCheck]
    baselines: list[BackendCheck]
    hardware: str

    @property
    def ok(self) -> bool:
        """Whether every package is installed in a tested version."""
        return all(package.ok for package in self.packages)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return asdict(self) | {"ok": self.ok}


def packages(requirements: Path = REQUIREMENTS) -> list[PackageCheck]:
    """Compare Python and every package of a requirements file with its range.

    Raises: ResourceError (E-DOCTOR) if the file is missing.
    """
    try:
        lines = requirements.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ResourceError(
            f"{requirements.name} is missing beside the program, so no tested range is known: use a complete checkout.",
            code="E-DOCTOR",
        ) from None
    wanted = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate()]
    own = _check(Requirement(f"python{PYTHON}"), platform.python_version())
    return [own, *(_check(r, installed_version(r.name)) for r in needed)]


def _check(requirement: Requirement, version: str | None) -> PackageCheck:
    # Local labels such as 2.13.0+cpu are builds of the same version: a range without a label takes them.
    ok = version is not None and requirement.specifier.contains(version, prereleases=True)
    tested = ",".join(sorted(map(str, requirement.specifier), reverse=True))  # the lower bound first
    return PackageCheck(requirement.name, version, tested, ok)


def backends() -> list[BackendCheck]:
    """Check which backends of the linear layers can run on this machine.

    Each is asked for by name, for 1024 × 1024 weights in one cluster on the CPU; Triton for CUDA.
    """
    import torch

    from core.pace import int8_columns
    from kernels import Backend, select_linear_backend
    from kernels.backend import triton_unsupported_reason

    device = torch.device("cpu")
    found = [BackendCheck("reference", True, "plain torch, runs everywhere")]
    for backend, weight_bits, activation_bits, use in (
        (Backend.INT8, 4, 8, f"integer products of quantised inputs and clusters of {int8_columns()} columns or more"),
        (Backend.INT8, 8, 8, "the same with 8-bit weights"),
        (Backend.INT4, 4, 16, "4-bit products of few rows of float inputs"),
    ):
        name = f"{backend.value}, {weight_bits}-bit weights"
        try:
            select_linear_backend(
                backend, weight_bits=weight_bits, activation_bits=activation_bits, offsets=(0, 1024), rows=1024, device=device
            )
            found.append(BackendCheck(name, True, use))
        except ValueError as error:
            found.append(BackendCheck(name, False, str(error)))
    if torch.cuda.is_available():
        reason = triton_unsupported_reason(torch.device("cuda"))
    else:
        reason = "torch finds no CUDA device"
    found.append(BackendCheck("triton", reason is None, reason or "kernels for CUDA"))
    return found


def examine() -> DoctorReport:
    """Check packages and backends. Raises: ResourceError (E-DOCTOR) without requirements.txt."""
    from core.provenance import hardware

    baselines = [BackendCheck(b.name, b.missing is None, b.missing or b.label) for b in BASELINES.values()]
    return DoctorReport(packages(), backends(), baselines, hardware())


def summary() -> str:
    """Say in one line which versions run and whether all are in their tested ranges, without importing them."""
    found = packages()
    named = ", ".join(f"{p.name} {p.version}" for p in found if p.name in ("torch", "transformers", "gradio"))
    outside = [p for p in found if not p.ok]
    verdict = "all versions are in their tested ranges" if not outside else "not tested: " + "; ".join(map(untested, outside))
    return f"{named}: {verdict}"


def untested(package: PackageCheck) -> str:
    """Say what is wrong with one package's version."""
    return f"{package.name} {package.version or 'is not installed'}" + (f" (tested {package.tested})" if package.tested else "")
