"""Folders that appear whole or not at all, whatever ends the process; the lock of a folder."""

import errno
import fcntl
import os

import pytest

from prfl_engine import files
from prfl_engine.errors import UserError
from prfl_engine.files import atomic_folder, checkpoints


def test_a_folder_appears_when_it_is_whole(tmp_path):
    folder = tmp_path / "run" / "checkpoint-1"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("1")
        assert not folder.exists()
        assert checkpoints(tmp_path / "run") == []
    assert os.listdir(tmp_path / "run") == ["checkpoint-1"]
    assert (folder / "a").read_text() == "1"


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "best"
    for name in ("a", "b"):
        with atomic_folder(folder) as temporary:
            (temporary / name).write_text(name)
    assert os.listdir(tmp_path) == ["best"]
    assert os.listdir(folder) == ["b"]


def test_a_failed_write_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "best"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_folder(folder) as temporary:
        (temporary / "a").write_text("new")
        raise OSError("disk full")
    assert (folder / "a").read_text() == "old"
    with atomic_folder(folder) as temporary:
        assert os.listdir(temporary) == []
        (temporary / "a").write_text("newer")
    assert (folder / "a").read_text() == "newer"


def test_checkpoints_are_in_order_of_their_step(tmp_path):
    others = "checkpoint-x", "checkpoint-²", "checkpoint-٣", "checkpoint-09", "best", ".checkpoint-11.tmp"
    for name in ("checkpoint-10", "checkpoint-9", *others):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def killed_at(call, work):
    """Do `work` in a child that dies without cleaning up at the call-th change of the disk; True: it did."""
    child = os.fork()
    if child == 0:
        left = [call]

        def counted(function):
            def inner(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return function(*args, **kwargs)

            return inner

        changes = (os, "replace"), (os, "fsync"), (files, "_exchange"), (os, "unlink"), (os, "rmdir")
        for module, name in changes:
            setattr(module, name, counted(getattr(module, name)))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_leaves_the_old_folder_or_the_new(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    folder = tmp_path / "best"

    def write(text):
        with atomic_folder(folder) as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text(text)

    write("old")
    calls, seen = 0, set()
    while killed_at(calls, lambda: write("new")):
        calls += 1
        assert folder.exists() or not exchange  # never absent
        files.clear_leftovers(tmp_path)
        assert os.listdir(tmp_path) == ["best"]
        found = {(folder / name).read_text() for name in ("a", "b")}
        assert len(found) == 1
        seen |= found
        write("old")
    assert calls >= 8 and seen == {"old", "new"}


def test_a_kill_leaves_no_half_of_a_folder_that_is_deleted(tmp_path):
    folder = tmp_path / "checkpoint-1"
    for calls in range(4):
        folder.mkdir(exist_ok=True)
        for name in ("a", "b"):
            (folder / name).touch()
        assert killed_at(calls, lambda: files.remove_folder(folder)) == (calls < 4)
        assert not folder.exists() or sorted(os.listdir(folder)) == ["a", "b"]
        files.clear_leftovers(tmp_path)
        assert not list(tmp_path.glob(".*"))


def test_files_and_folders_are_flushed_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    done, replace = [], os.replace
    flush = lambda file: done.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))  # noqa: E731
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("rename") or replace(a, b))
    with atomic_folder(tmp_path / "x") as temporary:
        (temporary / "ema").mkdir()
        for name in ("a", "ema/b"):
            (temporary / name).touch()
    assert done == ["b", "ema", "a", ".x.tmp", "rename", tmp_path.name]
    done.clear()
    files.write_whole(tmp_path / "c", "text")  # config.yaml, metrics.jsonl
    assert done == [".c.tmp", "rename", tmp_path.name] and (tmp_path / "c").read_text() == "text"


def test_the_lock_of_a_living_process_and_of_a_dead_one(tmp_path):
    ready, end = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with files.locked(tmp_path):
            os.write(ready[1], b"x")
            os.read(end[0], 1)
            os._exit(9)  # as a kill: nothing is tidied
    os.read(ready[0], 1)
    for enter in (files.locked(tmp_path).__enter__, lambda: files.check_free(tmp_path)):
        with pytest.raises(UserError, match=f"in use by process {child} on"):
            enter()
    os.write(end[1], b"x")
    os.waitpid(child, 0)
    for end_of_pipe in (*ready, *end):
        os.close(end_of_pipe)
    assert os.listdir(tmp_path) == [files.LOCK]
    files.check_free(tmp_path)
    with files.locked(tmp_path) as alone:
        assert alone
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with files.locked(tmp_path) as alone:
        assert not alone
