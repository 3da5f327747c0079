"""The verb `doctor`: installed versions with their tested ranges, and which backends run here."""

from __future__ import annotations

from argparse import Namespace

from app.cli.output import Console, table
from core.errors import ResourceError


def doctor(args: Namespace, console: Console) -> None:
    """Print installed versions with their tested ranges, and backends. Raises: ResourceError (E-DOCTOR) on an untested one."""
    from core.doctor import examine, untested

    report = examine()
    packages = [[p.name, p.version or "missing", p.tested, "tested" if p.ok else "NOT TESTED"] for p in report.packages]
    backends, baselines = (
        [[b.name, "runs" if b.runs else "no", b.reason] for b in found] for found in (report.backends, report.baselines)
    )
    console.finish(
        report.to_dict(),
        table(["package", "installed", "tested range", ""], packages, left=4)
        + "\n"
        + table(["backend", "", "why"], backends, left=3)
        + "\n"
        + table(["baseline of compare", "", "what it is, or why not"], baselines, left=3)
        + f"\n{report.hardware}\n",
    )
    if not report.ok:
        wrong = "; ".join(untested(p) for p in report.packages if not p.ok)
        raise ResourceError(f"Not tested: {wrong}. Results may be wrong: run pip install -r requirements.txt.", code="E-DOCTOR")
