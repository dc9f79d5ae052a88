"""Downloads, from a server on this machine."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.download import download, sha256_of

CONTENT = bytes(range(256)) * 20


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; `asked` lists the ranges."""

    asked = []

    def do_GET(self):
        given = self.headers.get("Range")
        Server.asked.append(given)
        first = int(given[len("bytes=") : -1]) if given else 0
        if first >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if given else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        self.wfile.write(CONTENT[first:])

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Server.asked = []
    server = HTTPServer(("127.0.0.1", 0), Server)
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
