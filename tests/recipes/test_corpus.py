"""Parallel text from files and archives."""

import gzip
import io
import tarfile
import zipfile

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.corpus import Pair, clean, hold_out, read_file, read_member, read_pairs, read_split, write_pairs


def make_tar(path, **files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"folder/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_a_file_is_read_from_a_tar_a_zip_or_a_folder(tmp_path):
    make_tar(tmp_path / "a.tgz", en="eins\r\nzwei  drei\n".encode())
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("folder/en", "eins\nzwei drei\n")
    for archive in ("a.tgz", "b.zip"):
        assert list(read_member(tmp_path, archive, "folder/en").lines) == ["eins", "zwei drei"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "en").write_text("vier\u2028fünf\n", encoding="utf-8")  # one line: U+2028 is not a line feed
    assert list(read_member(tmp_path, "a.tgz", "folder/en").lines) == ["vier fünf"]


def test_errors_name_the_missing_or_damaged_file(tmp_path):
    with pytest.raises(ConfigurationError, match="has neither a.tgz nor its folder/en"):
        read_member(tmp_path, "a.tgz", "folder/en")
    make_tar(tmp_path / "a.tgz", de=b"eins\n")
    with pytest.raises(ConfigurationError, match="a.tgz:folder/en cannot be read"):
        list(read_member(tmp_path, "a.tgz", "folder/en").lines)
    with pytest.raises(ConfigurationError, match="folder is not a file"):
        with tarfile.open(tmp_path / "c.tgz", "w:gz") as archive:
            archive.add(tmp_path, "folder", recursive=False)
        list(read_member(tmp_path, "c.tgz", "folder").lines)
    make_tar(tmp_path / "b.tgz", en=b"gut\nK\xe4tzin\n")
    with pytest.raises(ConfigurationError, match="b.tgz:folder/en, line 2 is not UTF-8"):
        list(read_member(tmp_path, "b.tgz", "folder/en").lines)


def test_a_damaged_gzip_file_is_reported_with_the_last_readable_line(tmp_path):
    lines = b"".join(b"%032x\n" % (number * 0x9E3779B97F4A7C15) for number in range(4000))
    packed = bytearray(gzip.compress(lines))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    (tmp_path / "text.gz").write_bytes(packed)
    with pytest.raises(ConfigurationError, match=r"text.gz cannot be read beyond line \d+ \(.*; fetch it again"):
        list(read_file(tmp_path / "text.gz").lines)


def test_empty_lines_are_refused_unless_allowed(tmp_path):
    (tmp_path / "a").write_text("one\n\n")
    (tmp_path / "b").write_text("eins\nzwei\n")
    sides = tmp_path / "a", tmp_path / "b"
    assert list(read_pairs(*map(read_file, sides), may_be_empty=True)) == [("one", "eins"), ("", "zwei")]
    with pytest.raises(ConfigurationError, match="a, line 2 is empty"):
        list(read_pairs(*map(read_file, sides)))
    (tmp_path / "b").write_text("eins\n")
    with pytest.raises(ConfigurationError, match="b ends before line 2"):
        list(read_pairs(*map(read_file, sides), may_be_empty=True))


def test_pairs_are_filtered_by_length_and_every_nth_is_held_out():
    pairs = [Pair("a", "b"), Pair("", "b"), Pair("a a", "b b b"), Pair("a a", "b b b b"), Pair("a " * 5, "b " * 5)]
    assert list(clean(pairs, longest=4, ratio=1.5)) == [Pair("a", "b"), Pair("a a", "b b b")]
    assert [split for split, _ in hold_out(pairs, 2)] == ["train", "valid", "train", "valid", "train"]


def test_written_pairs_are_read_back(tmp_path):
    pairs = [Pair("one", "eins"), Pair("", "zwei")]
    assert write_pairs(pairs, tmp_path, "train") == 2
    assert list(read_split(tmp_path, "train")) == pairs
