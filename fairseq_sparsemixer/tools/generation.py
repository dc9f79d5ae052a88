"""What fairseq-generate and fairseq-eval-lm print, and the text that it is held against."""

import os
import re
from pathlib import Path
from typing import List, Optional, Tuple

from fairseq_sparsemixer.errors import ConfigurationError

HYPOTHESIS = re.compile(r"D-(\d+)\t[^\t]*\t(.*)")  # D-<number> <tab> score <tab> text

PERPLEXITY = re.compile(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)")  # fairseq-eval-lm's last words


def read_perplexity(text: str) -> Optional[Tuple[float, float]]:
    """(loss in bits, perplexity) where fairseq-eval-lm says them in the text, else None."""
    found = PERPLEXITY.search(text)
    return found and (float(found.group(1)), float(found.group(2)))


def read_hypothesis(line: str) -> Optional[Tuple[int, str]]:
    """(number in the test set, detokenised text) where the line is a hypothesis, else None."""
    found = HYPOTHESIS.fullmatch(line.rstrip("\n"))
    return found and (int(found.group(1)), found.group(2))


def read_sentences(path: Path) -> List[str]:
    """The lines of a file, empty ones too: broken at ends of lines alone, not at the other breaks of Unicode, as fairseq does.

    Raises ConfigurationError for a file that cannot be read, with the line of what is not UTF-8.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ConfigurationError(f"{path} cannot be read (it does not exist, or is not a file); give another path")
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}, line {number} is not UTF-8; convert the file") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})") from None
    return [*lines, rest] if rest else lines
