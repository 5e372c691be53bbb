from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from cnf.files import write_whole


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "deep" / "a.csv"
    with write_whole(target) as part:
        part.write_text("1\n")
        assert not target.exists()
        assert part.parent == target.parent
        assert part.suffix == ".csv"
    assert target.read_text() == "1\n"
    assert names(target.parent) == ["a.csv"]


def test_a_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with write_whole(target) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_named_after_the_file(tmp_path):
    target = tmp_path / "a.txt"

    def fail() -> None:
        with write_whole(target) as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as raised:
        fail()
    assert raised.value.filename == str(target)
    assert names(tmp_path) == []


def test_a_failed_directory_leaves_nothing(tmp_path):
    def fail() -> None:
        with write_whole(tmp_path / "run") as part:
            part.mkdir()
            (part / "a").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


def test_a_directory_takes_the_place_of_its_older_self(tmp_path):
    target = tmp_path / "run"
    for text in ("old", "new"):
        with write_whole(target) as part:
            (part / "inner").mkdir(parents=True)
            (part / "inner" / "a").write_text(text)
    assert (target / "inner" / "a").read_text() == "new"
    assert names(tmp_path) == ["run"]


def test_a_directory_with_something_else_in_it_stays(tmp_path):
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")

    def replace() -> None:
        with write_whole(target) as part:
            part.mkdir()
            (part / "flow.json").write_text("{}")

    with pytest.raises(FileExistsError, match=r"thesis\.tex.*directory of its own"):
        replace()
    assert (target / "thesis.tex").read_text() == "years of work"
    assert names(tmp_path) == ["home"]


@pytest.mark.parametrize("directory_stands", [True, False])
def test_files_and_directories_do_not_replace_each_other(tmp_path, directory_stands):
    target = tmp_path / "a"
    target.mkdir() if directory_stands else target.write_text("old")

    def replace() -> None:
        with write_whole(target) as part:
            part.write_text("new") if directory_stands else part.mkdir()

    with pytest.raises(FileExistsError):
        replace()
    assert target.is_dir() == directory_stands
    assert names(tmp_path) == ["a"]


def test_writing_nothing_is_an_error(tmp_path):
    def nothing() -> None:
        with write_whole(tmp_path / "a"):
            pass

    with pytest.raises(FileNotFoundError, match="nothing was written"):
        nothing()


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    with write_whole(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    with write_whole(pipe) as part:
        part.write_text("hello")
    reader.join(timeout=10)
    assert received == ["hello"]
    assert pipe.is_fifo()
