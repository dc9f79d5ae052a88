"""Downloads for `prepare` steps: resumed after a break, and accepted only when they are known to be whole and of their kind."""

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
TIMEOUT = 60  # seconds that a server may be silent
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")  # of Content-Range
FIRST_BYTES = {".gz": b"\x1f\x8b", ".tgz": b"\x1f\x8b", ".zip": b"PK"}
BY_HAND = "fetch it by hand, and give --raw-dir"

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
    """Fetch url to path, unless it is there already. With a checksum, a broken download is continued the next time.

    advance(done, total) is told the bytes so far. Without sha256 the server must say how long the file is, and so long it must
    be; `arrived` is then told its checksum, before the file gets its name.
    Raises ConfigurationError when the server cannot be reached or the content is not what it should be.
    """
    if path.exists():
        return _check(path, sha256, f"{path} is not what was expected", "delete it and run again")
    part = path.with_name(path.name + PART)
    if part.is_symlink() or (part.exists() and not part.is_file()):
        raise ConfigurationError(f"{part} is not a file of a download; move it away")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        _take(file, part)
        resumed = sha256 is not None and part.stat().st_size > 0
        try:
            _fetch(url, file, resumed, sha256, advance)
            _check(part, sha256, f"{url} gives something else than expected", BY_HAND)
        except _Unusable:
            if not resumed:
                raise
            _fetch(url, file, False, sha256, advance)  # what was there was no beginning of it
            _check(part, sha256, f"{url} gives something else than expected", BY_HAND)
        file.flush()
        os.fsync(file.fileno())
        if sha256 is None:
            arrived(sha256_of(part))
        os.replace(part, path)


class _Unusable(ConfigurationError):
    """What was fetched is not the file."""


def _take(file: IO[bytes], part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigurationError(f"{part} is being written by another download; wait for it to end") from None


def _fetch(url: str, file: IO[bytes], resumed: bool, sha256: Optional[str], advance: Advance) -> None:
    """The whole of url into the file, from its end on when resumed."""
    if not resumed:
        file.truncate(0)
    done = os.fstat(file.fileno()).st_size
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            done, total = _place(url, response, done)
            if total is None and sha256 is None:
                raise ConfigurationError(
                    f"{url}: the server does not say how long the file is, and no checksum is known; {BY_HAND}"
                )
            file.truncate(done)  # 0 where the server starts over, whatever was asked
            for chunk in iter(lambda: response.read(CHUNK), b""):
                file.write(chunk)
                done += len(chunk)
                advance(done, total)
            file.flush()
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is left to fetch, if what is there is the file
            return
        raise ConfigurationError(f"{url} cannot be downloaded ({error}); {BY_HAND}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise ConfigurationError(f"{url} broke off ({reason}); run the same command again, or {BY_HAND}") from None
    if total is not None and done != total:
        raise ConfigurationError(f"{url} broke off after {done:,} of {total:,} bytes; run the same command again, or {BY_HAND}")


def _place(url: str, response: Any, asked: int) -> Tuple[int, Optional[int]]:
    """(where what the server sends begins, length of the whole file or None). Raises _Unusable for what is not a part of it."""
    if response.headers.get_content_type() == "text/html":
        raise _Unusable(f"{url} gives a page, not the file: it has moved, or something between here and there answers; {BY_HAND}")
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdigit() else None
    given = RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if given is None or int(given[1]) != asked:
        raise _Unusable(f"{url}: the server sends another part than was asked for; {BY_HAND}")
    last = int(given[2]) + 1
    return asked, last if given[3] == "*" else int(given[3])


def _check(path: Path, sha256: Optional[str], complaint: str, remedy: str) -> None:
    """Raise _Unusable for a file with another checksum, a page in place of a file, or another kind than the name says."""
    if sha256 is not None:
        found = sha256_of(path)
        if found != sha256:
            raise _Unusable(f"{complaint} (SHA-256 {found}, not {sha256}); {remedy}")
        return
    with path.open("rb") as file:
        start = file.read(512).lstrip()
    suffix = path.with_name(path.name[: -len(PART)]).suffix if path.suffix == PART else path.suffix
    if not start.startswith(FIRST_BYTES.get(suffix, b"")) or start[:9].lower().startswith((b"<!doctype", b"<html")):
        raise _Unusable(f"{complaint} (it begins with {start[:20]!r}, as no {suffix or 'such'} file does); {remedy}")
