"""Killed writers leave the old folder or the new one, many writers one whole folder, and a lock admits one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from core.errors import ResourceError
from core.storage import atomic_dir, file_lock, verify
from tests.core.storage_tools import ROOT, leftovers, run_python, write

KILLED_AT_EACH_STEP = """
    import os, signal, sys
    from pathlib import Path
    from core import folders, storage
    target, two_steps = Path(sys.argv[1]), sys.argv[2] == "two steps"
    if two_steps:
        folders.exchange = lambda one, other: False

    def write(value):
        with storage.atomic_dir(target) as stage:
            for name in "ab":
                (stage / name).write_text(value * 50_000)

    def child(limit):
        count = 0
        def hook(event, arguments):
            nonlocal count
            if event.split(".")[0] in ("open", "os", "shutil", "fcntl", "ctypes"):
                count += 1
                if count == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        write("n")

    killed, kept, swapped, limit = 0, 0, 0, 0
    while True:
        limit += 1
        write("o")
        pid = os.fork()
        if pid == 0:
            child(limit)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        storage.verify(target, checksums=True)
        values = {(target / name).read_text()[0] for name in "ab"}
        assert len(values) == 1, values
        if not os.WIFSIGNALED(status):
            assert values == {"n"}
            break
        killed += 1
        kept += values == {"o"}
        swapped += values == {"n"}
    write("o")
    assert os.listdir(target.parent) == [target.name], os.listdir(target.parent)
    print(killed, kept, swapped)
"""


@pytest.mark.parametrize("way", ["exchange", "two steps"])
def test_killed_at_every_file_operation_the_folder_is_old_or_new(tmp_path, way):
    done = run_python(KILLED_AT_EACH_STEP, str(tmp_path / "only" / "out"), way)
    assert done.returncode == 0, done.stderr
    killed, kept, swapped = map(int, done.stdout.split())
    assert killed >= 20 and kept >= 10 and swapped >= 1  # deaths on both sides of the publication were seen


def test_killed_at_random_times_the_folder_is_old_or_new(tmp_path):
    target = tmp_path / "only" / "out"
    code = """
        import sys
        from core.storage import atomic_dir
        print("ready", flush=True)
        for turn in range(10_000):
            with atomic_dir(sys.argv[1]) as stage:
                for name in "abc":
                    (stage / name).write_text(str(turn))
    """
    for turn in range(8):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(target)], cwd=ROOT,
                                 stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(0.02 + 0.013 * turn)
        child.kill()
        child.wait()
        child.stdout.close()
        if target.exists():
            verify(target, checksums=True)
            assert len({(target / name).read_text() for name in "abc"}) == 1
    write(target, "after", replace=True)
    assert leftovers(target) == []


def test_a_living_writers_stage_is_not_swept(tmp_path):
    target = tmp_path / "out"
    with atomic_dir(target) as slow:
        (slow / "a.txt").write_text("slow")
        write(target, "quick")
        assert slow.is_dir()
    verify(target)
    assert (target / "a.txt").read_text() == "slow" and leftovers(target) == []


def test_dead_stages_of_other_folders_are_swept_in_the_cache_only(tmp_path):
    dead, strange = tmp_path / "other.part-0123456789ab", tmp_path / "my.part-two"
    dead.mkdir(), strange.mkdir()
    write(tmp_path / "out", "a")
    assert dead.is_dir(), "where people keep their own folders only the target's own stages are"
    with atomic_dir(tmp_path / "slow") as living:
        write(tmp_path / "out", "b", replace=True)
        assert living.is_dir() and not dead.exists() and strange.is_dir()


def test_many_writers_of_one_folder_leave_one_whole_folder(tmp_path):
    target = tmp_path / "out"
    threads = [threading.Thread(target=write, args=(target, str(n)), kwargs={"replace": True}) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verify(target, checksums=True)
    assert leftovers(target) == []


def test_the_lock_names_its_holder(tmp_path):
    code = """
        import sys, time
        from core.storage import file_lock
        with file_lock(sys.argv[1]):
            print("locked", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "x.lock")], cwd=ROOT,
                             stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        with pytest.raises(ResourceError, match=f"process {child.pid}") as caught, \
                file_lock(tmp_path / "x.lock", timeout=0.2):
            pass
        assert caught.value.code == "E-TIME"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with file_lock(tmp_path / "x.lock", timeout=5):  # the holder's death frees it
        pass


def test_the_lock_admits_one_thread_at_a_time(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        with file_lock(tmp_path / "x.lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
