"""Read the server's settings from command line and environment, once.

QUANTSCOPE_MODEL            the model the page opens with; without it an embedded one, else the catalogue's download
QUANTSCOPE_DEVICE           where models run: cpu (without it) or cuda
QUANTSCOPE_WORKER_GB        memory limit of the worker processes together in GiB (0 = none)
QUANTSCOPE_JOB_MINUTES      longest time one job may take
QUANTSCOPE_SESSION_MINUTES  how long an idle visitor's results are kept
QUANTSCOPE_HOSTS            host names under which the page may be opened besides this machine's own, separated by commas
QUANTSCOPE_FILE_MB          largest zip file of a model that is offered or taken, in megabytes (2000 without it, on a Space 500)
QUANTSCOPE_CACHE_GB         limit of the cache folder in gigabytes (20 without it); folders used longest ago are removed first
QUANTSCOPE_WORKBENCH        test hook: "module:factory" of a stand-in for core's workbench, called with its options as keywords
SPACE_HOST                  on a Space, its host name
SPACE_ID                    set on a Hugging Face Space: local folders are then refused as models
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from core.cache import cache_limit
from core.errors import InputError
from core.memory import memory_bytes
from core.models.io.bundle import MAX_BUNDLE_BYTES

ROOT = Path(__file__).resolve().parents[1]
REAL_WORKBENCH = "core.workbench:Workbench"
GIB = 1024**3
SPACE_FILE_BYTES = 500_000_000
"""A Space has little disk, and its visitors are many."""
LIGHT_BYTES = 3 * GIB
"""Least address space for the light worker: its libraries map 1.2 GiB, loading a model of 135 M parameters 2.5 GiB."""


@dataclass(frozen=True)
class Settings:
    """The server's settings.

    Attributes:
        model: opened at start; its ranges are observed on `first_tokens` tokens of `text` before the first visitor comes.
        memory_bytes: address-space limit of both workers together, or of one (`main`, `light`); None for no limit.
        model_bytes: bytes of models that a worker keeps in memory; the least recently used are dropped first.
        light_weights: jobs on models of at most this many bytes may run on the light worker.
        rest_seconds: time without a job after which a worker frees the memory of all that it can load or compute again.
        nice: the worker's nice value, 0 to 19; higher gives the processor to others first.
        job_seconds: longest time of a job; a longer one is ended with an error. So is one that reports no progress for
            `step_seconds`, or whose worker shows no sign of life for `silent_seconds`.
        hosts: host names under which the page may be opened, besides those of this machine.
        file_bytes: largest file that may be uploaded, and largest zip file that is offered.
        grace_seconds: time that a cancelled job has to stop by itself before its worker is killed.
        worker_threads: OMP_NUM_THREADS of the worker; the page process itself uses one thread, see `app.main`.
    """

    model: str
    device: str = "cpu"
    text: str = "sotu"
    first_tokens: int = 1024
    on_space: bool = False
    workbench: str = REAL_WORKBENCH
    memory_bytes: int | None = None
    model_bytes: int = 3 * GIB
    light_weights: int = GIB
    rest_seconds: float = 120.0
    nice: int = 10
    job_seconds: float = 3600.0
    step_seconds: float = 900.0
    silent_seconds: float = 120.0
    session_seconds: float = 1800.0
    max_sessions: int = 400
    hosts: tuple[str, ...] = ()
    file_bytes: int = MAX_BUNDLE_BYTES
    grace_seconds: float = 1.2
    worker_threads: str | None = None

    @property
    def light(self) -> Settings | None:
        """The settings of the light worker, None where memory is not enough for two."""
        if self.memory_bytes is not None and self.memory_bytes < 2 * LIGHT_BYTES:
            return None
        limit = None if self.memory_bytes is None else max(LIGHT_BYTES, self.memory_bytes // 4)
        return replace(self, memory_bytes=limit, model_bytes=self.light_weights, nice=3)

    @property
    def main(self) -> Settings:
        """The settings of the main worker: with the memory that the light one leaves."""
        light = self.light
        if light is None or light.memory_bytes is None:
            return self
        return replace(self, memory_bytes=self.memory_bytes - light.memory_bytes)

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, *, model: str | None = None) -> Settings:
        """Read the settings of this process; `model` from the command line is preferred to the environment's.

        Raises: InputError naming a variable that cannot be used.
        """
        from app.engine import first_model

        cache_limit()
        on_space = bool(environment.get("SPACE_ID"))
        return cls(
            model=model or environment.get("QUANTSCOPE_MODEL") or first_model(),
            device=_device(environment),
            on_space=on_space,
            workbench=environment.get("QUANTSCOPE_WORKBENCH") or REAL_WORKBENCH,
            memory_bytes=_worker_memory(environment),
            job_seconds=60.0 * _number(environment, "QUANTSCOPE_JOB_MINUTES", 60.0),
            worker_threads=environment.get("OMP_NUM_THREADS"),
            session_seconds=60.0 * _number(environment, "QUANTSCOPE_SESSION_MINUTES", 30.0),
            hosts=_hosts(environment),
            file_bytes=_file_bytes(environment, SPACE_FILE_BYTES if on_space else MAX_BUNDLE_BYTES),
        )


def _device(environment: Mapping[str, str]) -> str:
    device = environment.get("QUANTSCOPE_DEVICE") or "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(
            f"QUANTSCOPE_DEVICE is {device[:40]!r}: use cpu, cuda, or cuda:1 for the second GPU.", code="E-PARAM-SETTING"
        )
    return device


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise InputError(f"{name} is {str(text)[:40]!r}: give a number of at least 0, without a unit.", code="E-PARAM-SETTING")
    return value


def _hosts(environment: Mapping[str, str]) -> tuple[str, ...]:
    names = [environment.get("SPACE_HOST", ""), *environment.get("QUANTSCOPE_HOSTS", "").split(",")]
    return tuple(name.strip() for name in names if name.strip())


def _file_bytes(environment: Mapping[str, str], default: int) -> int:
    count = int(1e6 * _number(environment, "QUANTSCOPE_FILE_MB", default / 1e6))
    if not 0 < count <= MAX_BUNDLE_BYTES:
        raise InputError(
            f"QUANTSCOPE_FILE_MB is {count / 1e6:g}: give 1 to {MAX_BUNDLE_BYTES / 1e6:g} megabytes.", code="E-PARAM-SETTING"
        )
    return count


def _worker_memory(environment: Mapping[str, str]) -> int | None:
    """Return the limit of mapped bytes: as set, else most of the machine's; None with a GPU, whose driver maps far more."""
    if environment.get("QUANTSCOPE_WORKER_GB"):
        return int(_number(environment, "QUANTSCOPE_WORKER_GB", 0.0) * GIB) or None
    if Path("/dev/nvidiactl").exists():
        return None
    return int(0.85 * memory_bytes())
