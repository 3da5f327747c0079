"""The environment of a worker process: the server's without its secrets, plus the server's choices."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from app.settings import ROOT, Settings

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|COOKIE|PRIVATE|API_?KEY|ACCESS_KEY|AUTH", re.IGNORECASE)


def worker_environment(settings: Settings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Build a worker's environment variables.

    Args:
        settings: the choices of this worker (`Settings.main` or `Settings.light`).
        environment: the server's own variables; those whose name looks like a secret are left out.
    """
    kept = {name: value for name, value in environment.items() if not SECRET.search(name)}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    kept.pop("OMP_NUM_THREADS", None)
    # Threads that spin while they wait occupy the core that the page needs: jobs and page are then 2 to 3 times slower.
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    threads = {"OMP_NUM_THREADS": settings.worker_threads} if settings.worker_threads else {}
    return {
        **kept,
        **threads,
        "PYTHONPATH": path,
        "QUANTSCOPE_WORKBENCH": settings.workbench,
        "QUANTSCOPE_DEVICE": settings.device,
        "QUANTSCOPE_LIMIT_BYTES": str(settings.memory_bytes or 0),
        "QUANTSCOPE_MODEL_BYTES": str(settings.model_bytes),
        "QUANTSCOPE_NICE": str(settings.nice),
        "QUANTSCOPE_REST_SECONDS": str(settings.rest_seconds),
        "QUANTSCOPE_ALLOW_LOCAL": "0" if settings.on_space else "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "2",
    }
