"""Atomic file writes."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fairseq_sparsemixer.files import overwritten, write_all, write_whole


def test_the_old_text_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_whole(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_whole(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["figures.json"]


def test_a_link_is_kept_and_its_target_is_written(tmp_path):
    kept, link = tmp_path / "elsewhere" / "kept.json", tmp_path / "link.json"
    kept.parent.mkdir()
    link.symlink_to(kept)
    write_whole(link, "text")
    assert link.is_symlink() and kept.read_text() == "text" and os.listdir(kept.parent) == ["kept.json"]


def test_a_device_can_be_written_and_a_full_one_is_an_error():
    write_whole(Path("/dev/null"), "text")
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), "text")
    assert Path("/dev/null").is_char_device() and Path("/dev/full").is_char_device()


def test_a_pipe_can_be_written_if_it_has_a_reader_and_is_an_error_otherwise(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device"):
        write_whole(pipe, "text")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reader, 100) == b"text" and pipe.is_fifo()


def test_concurrent_writers_leave_one_complete_text(tmp_path):
    texts = [str(number) * 10_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_whole(tmp_path / "figures.json", text), texts * 5))
    assert (tmp_path / "figures.json").read_text() in texts and os.listdir(tmp_path) == ["figures.json"]


def test_of_several_files_all_are_written_or_none(tmp_path):
    figures = tmp_path / "a.json"
    write_all({figures: "old", tmp_path / "b.png": b"\x89"})
    with pytest.raises(OSError, match="No such file") as error:
        write_all({figures: "new", tmp_path / "missing" / "b.png": b"\x89"})
    assert error.value.filename == str(tmp_path / "missing" / "b.png")
    assert figures.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.json", "b.png"]


def test_none_of_several_files_is_replaced_if_one_is_a_folder_or_does_not_reach_the_disk(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(IsADirectoryError) as error:
        write_all({tmp_path / "a.json": "new", tmp_path / "folder": "new"})
    assert error.value.filename == str(tmp_path / "folder")

    def full(descriptor):
        if os.fstat(descriptor).st_size > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        write_all({tmp_path / "a.json": "new", tmp_path / "b.json": "longer"})
    assert error.value.filename == str(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


def test_a_file_with_another_name_counts_as_overwritten(tmp_path):
    source, other = tmp_path / "in.pt", tmp_path / "other.pt"
    source.write_text("in")
    other.write_text("other")
    os.link(source, tmp_path / "hard.pt")
    (tmp_path / "soft.pt").symlink_to(source)
    for name in ("in.pt", "hard.pt", "soft.pt", "./in.pt"):
        assert overwritten([str(source)], [str(tmp_path / "new.pt"), f"{tmp_path}/{name}"]) == f"{tmp_path}/{name}"
    assert overwritten([str(source), str(tmp_path / "gone")], [str(other), str(tmp_path / "new.pt")]) is None
