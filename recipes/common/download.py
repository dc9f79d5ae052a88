"""Downloads for `prepare`: resumable, and accepted only if complete and of the expected file type."""

import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any, Callable, Optional, Tuple

from fairseq_sparsemixer.errors import ConfigurationError

CHUNK = 1 << 20  # bytes
PART = ".part"
TIMEOUT = 60  # seconds without data from the server
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")  # in Content-Range
FIRST_BYTES = {".gz": b"\x1f\x8b", ".tgz": b"\x1f\x8b", ".zip": b"PK"}
BY_HAND = "download it by hand and pass --raw-dir"

Advance = Callable[[int, Optional[int]], None]


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def download(
    url: str,
    path: Path,
    sha256: Optional[str] = None,
    advance: Advance = lambda *_: None,
    arrived: Callable[[str], None] = lambda checksum: None,
) -> None:
    """Fetch url to path, unless it exists. With a checksum, an interrupted download is resumed by the next call.

    advance(done, total) is called with the bytes so far. Without sha256, the server must send the length, and the file must have
    that length; then `arrived` is called with the checksum before the file is renamed to path.
    Raises ConfigurationError if the server cannot be reached or the content is wrong.
    """
    if path.exists():
        return _check(path, sha256, f"{path} is not the expected file", "delete it and run again")
    part = path.with_name(path.name + PART)
    if part.is_symlink() or (part.exists() and not part.is_file()):
        raise ConfigurationError(f"{part} exists and is not a regular file; move it away")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        _take(file, part)
        resumed = sha256 is not None and part.stat().st_size > 0
        try:
            _fetch(url, file, resumed, sha256, advance)
            _check(part, sha256, f"{url} did not send the expected file", BY_HAND)
        except _Unusable:
            if not resumed:
                raise
            _fetch(url, file, False, sha256, advance)  # the partial file was not the start of this file
            _check(part, sha256, f"{url} did not send the expected file", BY_HAND)
        file.flush()
        os.fsync(file.fileno())
        if sha256 is None:
            arrived(sha256_of(part))
        os.replace(part, path)


class _Unusable(ConfigurationError):
    """The download is not the expected file."""


def _take(file: IO[bytes], part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigurationError(f"{part} is being written by another download; wait for it to end") from None


def _fetch(url: str, file: IO[bytes], resumed: bool, sha256: Optional[str], advance: Advance) -> None:
    """Download url into the file; if resumed, from the file's current end."""
    if not resumed:
        file.truncate(0)
    done = os.fstat(file.fileno()).st_size
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            done, total = _place(url, response, done)
            if total is None and sha256 is None:
                raise ConfigurationError(
                    f"{url}: the server does not send the file's length, and its checksum is unknown; {BY_HAND}"
                )
            file.truncate(done)  # 0 if the server ignored the range and starts over
            for chunk in iter(lambda: response.read(CHUNK), b""):
                file.write(chunk)
                done += len(chunk)
                advance(done, total)
            file.flush()
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing left to fetch if the partial file is complete; the caller checks
            return
        raise ConfigurationError(f"{url} cannot be downloaded ({error}); {BY_HAND}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise ConfigurationError(f"{url}: download failed ({reason}); rerun the same command, or {BY_HAND}") from None
    if total is not None and done != total:
        raise ConfigurationError(f"{url}: download ended after {done:,} of {total:,} bytes; rerun the same command, or {BY_HAND}")


def _place(url: str, response: Any, asked: int) -> Tuple[int, Optional[int]]:
    """(offset at which the response starts, length of the whole file or None). Raises _Unusable for a wrong response."""
    if response.headers.get_content_type() == "text/html":
        raise _Unusable(f"{url} sent a web page, not the file: it has moved, or a proxy or login page answered; {BY_HAND}")
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdigit() else None
    given = RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if given is None or int(given[1]) != asked:
        raise _Unusable(f"{url}: the server sent a different byte range than requested; {BY_HAND}")
    last = int(given[2]) + 1
    return asked, last if given[3] == "*" else int(given[3])


def _check(path: Path, sha256: Optional[str], complaint: str, remedy: str) -> None:
    """Raise _Unusable if the checksum differs or, without one, if the file is a web page or does not match its suffix."""
    if sha256 is not None:
        found = sha256_of(path)
        if found != sha256:
            raise _Unusable(f"{complaint} (SHA-256 {found}, not {sha256}); {remedy}")
        return
    with path.open("rb") as file:
        start = file.read(512).lstrip()
    suffix = path.with_name(path.name[: -len(PART)]).suffix if path.suffix == PART else path.suffix
    if not start.startswith(FIRST_BYTES.get(suffix, b"")) or start[:9].lower().startswith((b"<!doctype", b"<html")):
        kind = f"{suffix} file" if suffix else "file"
        raise _Unusable(f"{complaint} (it starts with {start[:20]!r}, so it is not a valid {kind}); {remedy}")
