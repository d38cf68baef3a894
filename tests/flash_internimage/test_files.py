import errno
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from flash_internimage.checkpoints import save_atomically
from flash_internimage.files import (
    check_no_loops,
    own_folder,
    require_writable,
    writable_folder,
    write_atomically,
)
from tests.processes import CONTEXT


def fill_disk(file) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestWriteAtomically:
    def test_full_disk_is_reported_and_keeps_the_old_file(self, tmp_path):
        path = tmp_path / "last.pth"
        path.write_bytes(b"old")
        with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left .* writing {path}: free"):
            write_atomically(path, fill_disk)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_full_disk_is_recognized_as_the_cause_of_an_error_of_torch(self, tmp_path, monkeypatch):
        class Full:
            def write(self, data):
                fill_disk(self.file)

            def __init__(self, file):
                self.file = file

        save = torch.save
        monkeypatch.setattr(torch, "save", lambda contents, file: save(contents, Full(file)))
        with pytest.raises(OSError, match=r"No space left on device while writing .*last.pth"):
            save_atomically({"weight": torch.zeros(100)}, tmp_path / "last.pth")
        assert list(tmp_path.iterdir()) == []

    def test_writers_of_one_file_do_not_share_a_partial_file(self, tmp_path):
        path = tmp_path / "last.pth"

        def write_while_another_does(file) -> None:
            file.write(b"out")
            write_atomically(path, lambda other: other.write(b"inner"))
            file.write(b"er")

        write_atomically(path, write_while_another_does)
        assert path.read_bytes() == b"outer"

    @pytest.mark.parametrize("name", [251 * "x" + ".jpg", 83 * "漢" + ".jpg", 125 * "é" + ".jpg"])
    def test_the_longest_names_can_be_written(self, tmp_path, name):
        write_atomically(tmp_path / name, lambda file: file.write(b"data"))
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_permissions_follow_the_umask(self, tmp_path):
        before = os.umask(0o027)
        try:
            write_atomically(tmp_path / "file", lambda file: file.write(b""))
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


class TestWritableFolder:
    def test_what_is_written_remains(self, tmp_path):
        with writable_folder(tmp_path / "a" / "b", "-o"):
            (tmp_path / "a" / "b" / "file").touch()
        assert (tmp_path / "a" / "b" / "file").exists()

    def test_a_failure_leaves_no_trace(self, tmp_path):
        (tmp_path / "before").mkdir()
        for folder in (tmp_path / "before" / "a" / "b", tmp_path / "before"):
            with pytest.raises(ValueError, match="model"), writable_folder(folder, "-o"):
                raise ValueError("model")
        assert [*tmp_path.rglob("*")] == [tmp_path / "before"]

    def test_a_check_leaves_no_trace(self, tmp_path):
        require_writable(tmp_path / "a" / "b", "-o")
        assert not [*tmp_path.iterdir()]
        with pytest.raises(OSError, match=r"^-o .* cannot be written: File name too long$"):
            require_writable(tmp_path / "a" / ("b" * 300), "-o")
        assert not [*tmp_path.iterdir()]


def hold(folder: Path, held) -> None:
    with own_folder(folder):
        held.set()
        signal.pause()


class TestOwnFolder:
    @pytest.mark.slow
    def test_a_second_owner_is_rejected_until_the_first_is_killed(self, tmp_path):
        held = CONTEXT.Event()
        owner = CONTEXT.Process(target=hold, args=(tmp_path, held))
        owner.start()
        assert held.wait(60)
        with pytest.raises(OSError, match=f"another run is writing to {tmp_path}"):
            own_folder(tmp_path, timeout=0.1).__enter__()
        owner.kill()
        owner.join()
        with own_folder(tmp_path):
            pass

    def test_partial_files_of_a_killed_owner_are_removed(self, tmp_path):
        (tmp_path / ".last.pth.0123456789ab.partial").write_bytes(b"half")
        (tmp_path / "notes.partial").write_bytes(b"of somebody else")
        with own_folder(tmp_path):
            assert not list(tmp_path.glob(".*.partial"))
        assert (tmp_path / "notes.partial").exists()

    @pytest.mark.parametrize("error", [None, ValueError])
    def test_a_new_folder_that_stays_empty_is_removed(self, tmp_path, error):
        (tmp_path / "old").mkdir()
        for name in ("empty", "used", "old"):
            with suppress(ValueError), own_folder(tmp_path / name):
                if name == "used":
                    (tmp_path / name / "train.log").touch()
                if error:
                    raise error
        assert {path.name for path in tmp_path.iterdir()} == {"used", "old"}

    def test_a_folder_that_the_last_owner_removed_is_created_again(self, tmp_path, monkeypatch):
        acquire = FileLock.acquire

        def acquire_late(lock, timeout):
            monkeypatch.setattr(FileLock, "acquire", acquire)
            (tmp_path / "run").rmdir()
            (tmp_path / "run/.lock").touch()

        monkeypatch.setattr(FileLock, "acquire", acquire_late)
        with own_folder(tmp_path / "run"):
            (tmp_path / "run/train.log").touch()

    def test_errors_of_a_run_that_removes_its_folder_are_kept(self, tmp_path):
        def run() -> None:
            with own_folder(tmp_path / "run"):
                shutil.rmtree(tmp_path / "run")
                raise ValueError("of the run")

        with pytest.raises(ValueError, match="of the run"):
            run()

    def test_the_run_may_change_its_current_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with own_folder("run"):
            monkeypatch.chdir("/")
        assert not (tmp_path / "run").exists()

    def test_the_folder_is_created(self, tmp_path):
        with own_folder(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()


class TestCheckNoLoops:
    @pytest.mark.parametrize(
        ("link", "target"),
        [("a/self", "../a"), ("a/b/up", ".."), ("a/b/root", "../.."), ("a/b/cross", "../../c")],
    )
    def test_loops_of_links_are_rejected(self, tmp_path, link, target):
        (tmp_path / "a/b").mkdir(parents=True)
        (tmp_path / "c").mkdir()
        (tmp_path / "c/back").symlink_to("../a")
        (tmp_path / link).symlink_to(target)
        with pytest.raises(OSError, match=r"symbolic link .* leads back to"):
            check_no_loops(tmp_path)

    def test_other_links_are_accepted(self, tmp_path):
        (tmp_path / "data/a").mkdir(parents=True)
        (tmp_path / "elsewhere/b").mkdir(parents=True)
        (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere/b")
        (tmp_path / "data/again").symlink_to("a")
        (tmp_path / "data/nowhere").symlink_to("nothing")
        (tmp_path / "data/a/itself.png").symlink_to("itself.png")
        check_no_loops(tmp_path / "data")
