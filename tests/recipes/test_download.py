"""Downloads from a local server."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common import download as download_module
from recipes.common.download import download, sha256_of

CONTENT = bytes(range(256)) * 20


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, with range requests; `asked` lists the ranges. `play`, if set, answers instead."""

    asked, play = [], None

    def do_GET(self):
        if Server.play is not None:
            Server.asked.append(self.headers.get("Range"))
            return Server.play(self)
        given = self.headers.get("Range")
        Server.asked.append(given)
        first = int(given[len("bytes=") : -1]) if given else 0
        if first >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if given else 200)
        self.answer(CONTENT[first:], **{"Content-Range": f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}"} if given else {})

    def answer(self, content, length=None, **headers):
        """Send headers and content; length: a false Content-Length."""
        if length != "":
            self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Server.asked, Server.play = [], None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/data"
    server.shutdown()
    server.server_close()


@pytest.fixture
def checksum(tmp_path):
    (tmp_path / "original").write_bytes(CONTENT)
    return sha256_of(tmp_path / "original")


def test_an_interrupted_download_is_resumed(url, checksum, tmp_path):
    (tmp_path / "data.part").write_bytes(CONTENT[:1000])
    download(url, tmp_path / "data", checksum)
    assert (tmp_path / "data").read_bytes() == CONTENT
    assert Server.asked == ["bytes=1000-"]


def test_a_complete_download_that_was_not_renamed_is_used(url, checksum, tmp_path):
    (tmp_path / "data.part").write_bytes(CONTENT)
    download(url, tmp_path / "data", checksum)
    assert (tmp_path / "data").read_bytes() == CONTENT


def test_an_existing_file_is_not_downloaded_again(url, checksum, tmp_path):
    download(url, tmp_path / "data", checksum)
    download(url, tmp_path / "data", checksum)
    assert len(Server.asked) == 1


def test_unexpected_content_is_refused_and_never_renamed(url, tmp_path):
    with pytest.raises(ConfigurationError, match="SHA-256"):
        download(url, tmp_path / "data", "0" * 64)
    assert not (tmp_path / "data").exists()


def test_an_unreachable_server_gives_a_one_line_error(tmp_path):
    with pytest.raises(ConfigurationError, match="--raw-dir"):
        download("http://127.0.0.1:9/data", tmp_path / "data")


@pytest.mark.parametrize("junk", [b"x" * 100, b"x" * len(CONTENT), b"x" * 2 * len(CONTENT)])
def test_a_partial_file_with_other_content_is_downloaded_anew(url, checksum, tmp_path, junk):
    (tmp_path / "data.part").write_bytes(junk)
    download(url, tmp_path / "data", checksum)
    assert (tmp_path / "data").read_bytes() == CONTENT
    assert Server.asked == [f"bytes={len(junk)}-", None]


def test_a_download_without_a_known_checksum_is_not_resumed(url, tmp_path):
    (tmp_path / "data.part").write_bytes(CONTENT[:1000])
    download(url, tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == CONTENT and Server.asked == [None]


def played(answer, url, path, **options):
    """Download from a server that answers with `answer`; the checksums that were reported."""
    Server.play = answer
    noted = []
    try:
        download(url, path, arrived=noted.append, **options)
    finally:
        assert path.exists() or not noted, "a checksum was recorded for a file that did not arrive"
    return noted


def ok(handler, content, length=None, status=200, **headers):
    handler.send_response(status)
    handler.answer(content, length, **{name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("name, answer, message", [
    ("data", lambda h: ok(h, CONTENT[:100], len(CONTENT)), "download ended after 100 of 5,120"),
    ("data", lambda h: ok(h, CONTENT, ""), "does not send the file's length, and its checksum is unknown"),
    ("data", lambda h: ok(h, CONTENT, "many"), "does not send the file's length"),
    ("data", lambda h: ok(h, b"<p>Log in", Content_Type="text/html; charset=utf-8"), "sent a web page, not the file"),
    ("data", lambda h: ok(h, b"\n<!DOCTYPE html><p>Log in"), "did not send the expected file .it starts with"),
    ("data.gz", lambda h: ok(h, CONTENT), "is not a valid .gz file"),
    ("data.zip", lambda h: ok(h, b"moved"), "is not a valid .zip file"),
    ("data.tgz", lambda h: ok(h, b""), "is not a valid .tgz file"),
    ("data", lambda h: ok(h, CONTENT, status=206, Content_Range="bytes 5-99/100"), "a different byte range than requested"),
    ("data", lambda h: ok(h, CONTENT, status=206), "a different byte range than requested"),
    ("data", lambda h: ok(h, CONTENT[:9], status=206, Content_Range="bytes 0-8/5120"), "download ended after 9 of 5,120"),
    ("data", lambda h: h.wfile.write(b"no HTTP"), "download failed"),
    ("data", lambda h: h.send_error(503), "cannot be downloaded"),
])  # fmt: skip
def test_an_incomplete_or_wrong_file_is_refused_and_never_renamed(url, tmp_path, name, answer, message):
    with pytest.raises(ConfigurationError, match=message):
        played(answer, url, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("given", ["bytes 0-4119/5120", "bytes 2000-5119/5120", "5120", None])
def test_a_wrong_byte_range_is_not_appended_to_the_partial_file(url, checksum, tmp_path, given):
    def answer(handler):
        if handler.headers.get("Range") is None:
            return ok(handler, CONTENT)
        ok(handler, CONTENT[1000:], status=206, **({} if given is None else {"Content-Range": given}))

    (tmp_path / "data.part").write_bytes(CONTENT[:1000])
    played(answer, url, tmp_path / "data", sha256=checksum)
    assert (tmp_path / "data").read_bytes() == CONTENT and Server.asked == ["bytes=1000-", None]


def test_a_stalled_server_times_out(url, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT", 0.2)
    end = threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.answer(CONTENT[:100], len(CONTENT))
        end.wait(60)

    try:
        with pytest.raises(ConfigurationError, match="download failed .*time"):
            played(stall, url, tmp_path / "data")
    finally:
        end.set()


def test_the_checksum_is_reported_once_the_length_matches_the_servers(url, checksum, tmp_path):
    assert played(None, url, tmp_path / "data") == [checksum]


def test_two_downloads_do_not_write_the_same_file(url, checksum, tmp_path):
    end = threading.Event()

    def slow(handler):
        handler.send_response(200)
        handler.answer(CONTENT[:100], len(CONTENT))
        end.wait(60)
        handler.wfile.write(CONTENT[100:])

    Server.play = slow
    first = threading.Thread(target=download, args=(url, tmp_path / "data", checksum))
    first.start()
    while not Server.asked:
        time.sleep(0.01)
    with pytest.raises(ConfigurationError, match="is being written by another download"):
        download(url, tmp_path / "data", checksum)
    end.set()
    first.join()
    assert (tmp_path / "data").read_bytes() == CONTENT
