"""Sources of raw files: downloads and --raw-dir."""

from argparse import Namespace

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.session import Session
from recipes.common.sources import SUMS, fetch


@pytest.fixture
def session(tmp_path):
    return Session("some", Namespace(out=tmp_path / "out", smoke=False, raw_dir=None))


def test_the_first_downloads_checksum_is_recorded_and_a_changed_file_refused(session, tmp_path):
    (tmp_path / "file").write_bytes(b"\x1f\x8b and more")
    urls = {"name.tgz": (tmp_path / "file").as_uri()}
    folder = fetch(session, urls)
    assert (folder / "name.tgz").read_bytes() == b"\x1f\x8b and more"
    sums = (folder / SUMS).read_text()
    assert sums.endswith("  name.tgz\n") and fetch(session, urls) == folder and (folder / SUMS).read_text() == sums
    (folder / "name.tgz").write_text("changed")
    with pytest.raises(ConfigurationError, match="name.tgz is not the expected file"):
        fetch(session, urls)


def test_a_known_checksum_is_verified_and_not_recorded(session, tmp_path):
    (tmp_path / "file").write_bytes(b"\x1f\x8b and more")
    urls = {"name.tgz": (tmp_path / "file").as_uri()}
    with pytest.raises(ConfigurationError, match="did not send the expected file"):
        fetch(session, urls, {"name.tgz": "0" * 64})
    assert not (session.out / "downloads" / "name.tgz").exists() and not (session.out / "downloads" / SUMS).exists()


def test_existing_raw_files_are_used(session, tmp_path):
    session.options.raw_dir = tmp_path
    assert fetch(session, {"name": "http://nowhere.invalid"}) == tmp_path
    session.options.raw_dir = tmp_path / "missing"
    with pytest.raises(ConfigurationError, match="--raw-dir .*missing is not a folder"):
        fetch(session, {})
