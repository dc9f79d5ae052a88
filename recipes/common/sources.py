"""The raw data of a recipe: --raw-dir, or downloads to OUT/downloads, whose checksums are recorded and verified."""

from pathlib import Path
from typing import Dict, Mapping, Optional

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from recipes.common import smoke
from recipes.common.download import download
from recipes.common.session import DOWNLOADS, Session

SUMS = "SHA256SUMS"  # in the format of sha256sum: one "<checksum>  <file>" per line


def downloads(session: Session) -> Path:
    """The folder of the recipe's downloads."""
    return session.out / DOWNLOADS


def say_source(session: Session, urls: Mapping[str, str]) -> str:
    """Where the raw text comes from, for --dry-run."""
    if session.small:
        return smoke.SAYS
    if session.options.raw_dir is not None:
        return f"reads {session.options.raw_dir}"
    return "downloads " + ", ".join(urls.values()) + f" to {downloads(session)}"


def fetch(session: Session, urls: Mapping[str, str], sums: Mapping[str, str] = {}) -> Path:
    """The folder of the raw files: --raw-dir, or OUT/downloads after downloading `urls` (name -> address).

    sums: the known SHA-256 checksums. For other files, the checksum of the first download with the length that the server
    announced is recorded in SHA256SUMS, and later calls refuse a different file.
    """
    if session.options.raw_dir is not None:
        if not session.options.raw_dir.is_dir():
            raise ConfigurationError(f"--raw-dir {session.options.raw_dir} is not a folder")
        return session.options.raw_dir
    folder = downloads(session)
    folder.mkdir(parents=True, exist_ok=True)
    noted = read_sums(folder / SUMS)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=session.console) as progress:
        for name, url in urls.items():
            task = progress.add_task(name)

            def advance(done: int, total: Optional[int], task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            def note(checksum: str, name: str = name) -> None:
                noted[name] = checksum
                write_whole(folder / SUMS, "".join(f"{value}  {key}\n" for key, value in noted.items()))

            download(url, folder / name, sums.get(name, noted.get(name)), advance, note)
    return folder


def read_sums(path: Path) -> Dict[str, str]:
    """{file name: SHA-256} of a file in the format of sha256sum; empty if there is none."""
    if not path.is_file():
        return {}
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {fields[1]: fields[0] for fields in lines if len(fields) == 2}
