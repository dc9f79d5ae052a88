"""Files that are whole or not there."""

import os

import pytest

from fairseq_sparsemixer.files import write_whole


def test_the_old_text_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
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
