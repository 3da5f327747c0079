"""Bound the folder of uploaded and offered files: old ones are removed, and it has room for a few."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from app.door.rules import Refusal

FILE_SECONDS = 1800.0
"""Time for which an uploaded or offered file is kept."""
UPLOADS = 4
"""Files of the largest size that fit in the folder."""


class Files:
    """The files in `folder` that came after the server started; those from before belong to the page itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started_at = folder, time.time()

    def tidy(self) -> int:
        """Remove files that are too old, and folders that are empty. Returns: bytes that are left."""
        left, now = 0, time.time()
        for path, status in self._files():
            if now - status.st_mtime > FILE_SECONDS:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # other files are in it
                    path.parent.rmdir()
            else:
                left += status.st_size
        return left

    def check_room(self, most: int) -> None:
        """Check that one more upload of up to `most` bytes fits. Raises: Refusal."""
        if self.tidy() + most > UPLOADS * most:
            minutes = round(FILE_SECONDS / 60)
            raise Refusal(503, f"Others are uploading files too, and the room for them is taken: try again in {minutes} minutes.")

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for place, _, names in os.walk(self.folder):
            for name in names:
                with contextlib.suppress(OSError):  # it was removed meanwhile
                    path = Path(place, name)
                    status = path.lstat()
                    if status.st_mtime >= self.started_at:
                        yield path, status
