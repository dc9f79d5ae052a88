"""What fairseq-generate prints, and the text that it is held against."""

import re
from pathlib import Path
from typing import List, Optional, Tuple

HYPOTHESIS = re.compile(r"D-(\d+)\t[^\t]*\t(.*)")  # D-<number> <tab> score <tab> text


def read_hypothesis(line: str) -> Optional[Tuple[int, str]]:
    """(number in the test set, detokenised text) where the line is a hypothesis, else None."""
    found = HYPOTHESIS.fullmatch(line.rstrip("\n"))
    return found and (int(found.group(1)), found.group(2))


def read_sentences(path: Path) -> List[str]:
    """The lines of a file, empty ones too: broken at ends of lines alone, not at the other breaks of Unicode, as fairseq does."""
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    return [*lines, rest] if rest else lines
