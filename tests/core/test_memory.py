"""The memory of a container counts where it is smaller than the machine's, and every library's way to say that none is left."""

from __future__ import annotations

import psutil
import pytest
import torch

from core import memory


def container(folder, monkeypatch, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", folder)


@pytest.mark.parametrize("names", memory._LIMITS)
def test_a_containers_limit_counts(tmp_path, monkeypatch, names):
    container(tmp_path, monkeypatch, dict(zip(names, ("1000000\n", "400000\n"), strict=True)))
    assert (memory.memory_bytes(), memory.free_memory_bytes()) == (1_000_000, 600_000)
    container(tmp_path, monkeypatch, {names[1]: "2000000"})
    assert memory.free_memory_bytes() == 0


@pytest.mark.parametrize("files", [{}, {"memory.max": "max\n", "memory.current": "5\n"}, {"memory.max": "7"}])
def test_without_a_limit_the_machine_counts(tmp_path, monkeypatch, files):
    container(tmp_path, monkeypatch, files)
    assert memory.memory_bytes() == psutil.virtual_memory().total
    assert 0 < memory.free_memory_bytes() <= memory.memory_bytes()


def test_running_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    for error in (found.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert memory.is_out_of_memory(error)
    assert not memory.is_out_of_memory(RuntimeError("shapes do not fit"))
