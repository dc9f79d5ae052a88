"""Downloads, from a server on this machine."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common import download as download_module
from recipes.common.download import download, sha256_of

CONTENT = bytes(range(256)) * 20


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; `asked` lists the ranges. `play`, when set, answers in its place."""

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
        """Headers and content; length: what is said of it, when that is not true."""
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


def test_a_broken_download_goes_on_where_it_stopped(url, checksum, tmp_path):
    (tmp_path / "data.part").write_bytes(CONTENT[:1000])
    download(url, tmp_path / "data", checksum)
    assert (tmp_path / "data").read_bytes() == CONTENT
    assert Server.asked == ["bytes=1000-"]


def test_what_was_fetched_whole_but_not_renamed_is_taken(url, checksum, tmp_path):
    (tmp_path / "data.part").write_bytes(CONTENT)
    download(url, tmp_path / "data", checksum)
    assert (tmp_path / "data").read_bytes() == CONTENT


def test_a_file_that_is_there_is_not_fetched_again(url, checksum, tmp_path):
    download(url, tmp_path / "data", checksum)
    download(url, tmp_path / "data", checksum)
    assert len(Server.asked) == 1


def test_other_content_than_expected_is_refused_and_never_gets_the_name(url, tmp_path):
    with pytest.raises(ConfigurationError, match="SHA-256"):
        download(url, tmp_path / "data", "0" * 64)
    assert not (tmp_path / "data").exists()


def test_a_server_that_does_not_answer_ends_in_one_sentence(tmp_path):
    with pytest.raises(ConfigurationError, match="--raw-dir"):
        download("http://127.0.0.1:9/data", tmp_path / "data")


@pytest.mark.parametrize("junk", [b"x" * 100, b"x" * len(CONTENT), b"x" * 2 * len(CONTENT)])
def test_what_is_no_beginning_of_the_file_is_fetched_anew(url, checksum, tmp_path, junk):
    (tmp_path / "data.part").write_bytes(junk)
    download(url, tmp_path / "data", checksum)
    assert (tmp_path / "data").read_bytes() == CONTENT
    assert Server.asked == [f"bytes={len(junk)}-", None]


def test_nothing_is_continued_of_which_no_checksum_is_known(url, tmp_path):
    (tmp_path / "data.part").write_bytes(CONTENT[:1000])
    download(url, tmp_path / "data")
    assert (tmp_path / "data").read_bytes() == CONTENT and Server.asked == [None]


def played(answer, url, path, **options):
    """Download from a server that answers so."""
    Server.play = answer
    noted = []
    try:
        download(url, path, arrived=noted.append, **options)
    finally:
        assert path.exists() or not noted, "a checksum is noted of what did not arrive"
    return noted


def ok(handler, content, length=None, status=200, **headers):
    handler.send_response(status)
    handler.answer(content, length, **{name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize("name, answer, message", [
    ("data", lambda h: ok(h, CONTENT[:100], len(CONTENT)), "broke off"),
    ("data", lambda h: ok(h, CONTENT, ""), "does not say how long the file is, and no checksum is known"),
    ("data", lambda h: ok(h, CONTENT, "many"), "does not say how long"),
    ("data", lambda h: ok(h, b"<p>Log in", Content_Type="text/html; charset=utf-8"), "gives a page, not the file"),
    ("data", lambda h: ok(h, b"\n<!DOCTYPE html><p>Log in"), "something else than expected .it begins with"),
    ("data.gz", lambda h: ok(h, CONTENT), "as no .gz file does"),
    ("data.zip", lambda h: ok(h, b"moved"), "as no .zip file does"),
    ("data.tgz", lambda h: ok(h, b""), "as no .tgz file does"),
    ("data", lambda h: ok(h, CONTENT, status=206, Content_Range="bytes 5-99/100"), "another part than was asked for"),
    ("data", lambda h: ok(h, CONTENT, status=206), "another part than was asked for"),
    ("data", lambda h: ok(h, CONTENT[:9], status=206, Content_Range="bytes 0-8/5120"), "broke off after 9 of 5,120"),
    ("data", lambda h: h.wfile.write(b"no HTTP"), "broke off"),
    ("data", lambda h: h.send_error(503), "cannot be downloaded"),
])  # fmt: skip
def test_what_is_not_whole_or_not_the_file_never_gets_the_name(url, tmp_path, name, answer, message):
    with pytest.raises(ConfigurationError, match=message):
        played(answer, url, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("given", ["bytes 0-4119/5120", "bytes 2000-5119/5120", "5120", None])
def test_a_wrong_part_is_not_put_behind_the_one_that_is_there(url, checksum, tmp_path, given):
    def answer(handler):
        if handler.headers.get("Range") is None:
            return ok(handler, CONTENT)
        ok(handler, CONTENT[1000:], status=206, **({} if given is None else {"Content-Range": given}))

    (tmp_path / "data.part").write_bytes(CONTENT[:1000])
    played(answer, url, tmp_path / "data", sha256=checksum)
    assert (tmp_path / "data").read_bytes() == CONTENT and Server.asked == ["bytes=1000-", None]


def test_a_server_that_falls_silent_is_given_up(url, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT", 0.2)
    end = threading.Event()

    def stall(handler):
        handler.send_response(200)
        handler.answer(CONTENT[:100], len(CONTENT))
        end.wait(60)

    try:
        with pytest.raises(ConfigurationError, match="broke off .*time"):
            played(stall, url, tmp_path / "data")
    finally:
        end.set()


def test_the_checksum_is_told_once_the_length_is_the_servers(url, checksum, tmp_path):
    assert played(None, url, tmp_path / "data") == [checksum]


def test_two_downloads_do_not_write_one_file(url, checksum, tmp_path):
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
