"""The file of --moe-trace."""

import gzip
import json
import os
from pathlib import Path

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.traces.files import TraceWriter, rank_file, read_lines


def line(sentence):
    values = {
        "subset": "test",
        "layer": "l",
        "sentence": sentence,
        "position": 0,
        "word": "wörd",
        "experts": [1],
        "weights": [0.5],
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def write(path, *sentences, rank=0, world_size=1, resume=False):
    writer = TraceWriter(str(path), rank, world_size)
    writer.start(resume)
    for sentence in sentences:
        writer.add([line(sentence)])
        writer.flush()
    return writer


def numbers(path):
    return [found.sentence for found in read_lines(str(path), "--moe-replay")]


@pytest.mark.parametrize("name, expected", [
    ("trace.jsonl", "trace-rank-3.jsonl"), ("a.b.jsonl.gz", "a.b-rank-3.jsonl.gz"), ("trace", "trace-rank-3"),
    ("t.gz", "t-rank-3.gz"),
])  # fmt: skip
def test_the_rank_stands_before_the_ending(name, expected):
    assert rank_file(Path("folder") / name, 3) == Path("folder") / expected


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_what_was_written_is_read(tmp_path, name):
    path = tmp_path / "new" / name
    write(path, 1, 2)
    write(path, 3, resume=True)
    assert numbers(path) == [1, 2, 3]
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    write(path, 4)
    assert numbers(path) == [4]


def test_ranks_are_read_together_and_replace_those_of_a_larger_world(tmp_path):
    path = tmp_path / "trace.jsonl"
    write(path, 9)
    for rank in range(3):
        write(path, rank, 10 + rank, rank=rank, world_size=3)
    assert numbers(path) == [0, 10, 1, 11, 2, 12]
    for rank in range(2):
        write(path, 20 + rank, rank=rank, world_size=2)
    assert numbers(path) == [20, 21]
    write(path, 30)
    assert numbers(path) == [30] and len(list(tmp_path.iterdir())) == 1


def test_several_ranks_leave_a_folder_or_pipe_of_that_name_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        write(tmp_path / name, 1, rank=0, world_size=2)
        assert (tmp_path / name).exists() and (tmp_path / f"{name}-rank-0").exists()


def test_a_missing_rank_is_named(tmp_path):
    write(tmp_path / "trace.jsonl", 1, rank=1, world_size=2)
    with pytest.raises(ConfigurationError, match="lacks .*trace-rank-0.jsonl; put the files of all ranks there"):
        numbers(tmp_path / "trace.jsonl")


def test_a_killed_writer_leaves_whole_members(tmp_path):
    """Each flush of a compressed file ends a member of its own, so that what was flushed can be read."""
    write(tmp_path / "trace.gz", 1, 2).add([line(3)])
    assert numbers(tmp_path / "trace.gz") == [1, 2]


@pytest.mark.parametrize("content, message", [
    (gzip.compress(line(1).encode())[:-9], "cannot be read after line"),
    (b"no gzip", "cannot be read after line 0"),
    (gzip.compress(b"[]\n"), "line 1, is not a line of --moe-trace"),
    (gzip.compress(line(1).replace("[0.5]", "[]").encode()), "line 1, is not a line"),
    (gzip.compress(line(1).replace("[1]", "[true]").encode()), "line 1, is not a line"),
    (gzip.compress(b"\xff"), "cannot be read after line 0"),
], ids=range(6))  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / "trace.gz").write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"--moe-replay .*trace.gz,? {message}"):
        numbers(tmp_path / "trace.gz")


def test_a_full_disk_ends_the_trace_with_one_warning(tmp_path, caplog):
    writer = write(tmp_path / "folder" / "trace", 1)
    writer.file = tmp_path / "folder"  # a folder cannot be written to
    for sentence in (2, 3):
        writer.add([line(sentence)])
        writer.flush()
    assert caplog.text.count("ends here") == 1
