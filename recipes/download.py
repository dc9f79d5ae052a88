"""Downloads for `prepare` steps: resumed after a break, and accepted only when the checksum is right."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable, Optional

from fairseq_sparsemixer.errors import ConfigurationError

CHUNK = 1 << 20  # bytes
PART = ".part"


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def download(
    url: str, path: Path, sha256: Optional[str] = None, advance: Callable[[int, Optional[int]], None] = lambda *_: None
) -> None:
    """Fetch url to path, unless it is there already. A broken download is kept beside it and continued the next time.

    advance(done, total) is told the bytes so far. sha256 None accepts any content: for sources that publish no checksum.
    Raises ConfigurationError when the server cannot be reached or the content is not what it should be.
    """
    if path.exists():
        return _check(path, sha256)
    part = path.with_name(path.name + PART)
    part.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request) as response:
            if response.status != 206:  # the server starts over, whatever was asked
                done = 0
            length = response.headers.get("Content-Length")
            total = None if length is None else done + int(length)
            with part.open("ab" if done else "wb") as file:
                for chunk in iter(lambda: response.read(CHUNK), b""):
                    file.write(chunk)
                    done += len(chunk)
                    advance(done, total)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to fetch
            raise ConfigurationError(f"{url} cannot be downloaded ({error}); fetch it by hand and give --raw-dir") from None
    except OSError as error:
        raise ConfigurationError(f"{url} broke off ({error}); run the same command again to go on, or give --raw-dir") from None
    _check(part, sha256)
    os.replace(part, path)


def _check(path: Path, sha256: Optional[str]) -> None:
    if sha256 is not None:
        found = sha256_of(path)
        if found != sha256:
            raise ConfigurationError(f"{path} is not what was expected (SHA-256 {found}, not {sha256}); delete it and run again")
