"""Parses the output of fairseq-generate and fairseq-eval-lm, and reads the text it is compared with."""

import os
import re
from pathlib import Path
from typing import List, Optional, Tuple

from fairseq_sparsemixer.errors import ConfigurationError

HYPOTHESIS = re.compile(r"D-(\d+)\t[^\t]*\t(.*)")  # D-<number> <tab> score <tab> text

PERPLEXITY = re.compile(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)")  # at the end of fairseq-eval-lm's output


def read_perplexity(text: str) -> Optional[Tuple[float, float]]:
    """(loss in bits, perplexity) from fairseq-eval-lm's output; None if they are not in the text."""
    found = PERPLEXITY.search(text)
    return found and (float(found.group(1)), float(found.group(2)))


def read_hypothesis(line: str) -> Optional[Tuple[int, str]]:
    """(number in the test set, detokenised text) if the line is a hypothesis, else None."""
    found = HYPOTHESIS.fullmatch(line.rstrip("\n"))
    return found and (int(found.group(1)), found.group(2))


def read_sentences(path: Path) -> List[str]:
    """The lines of a file, including empty ones; split at newlines only, as in fairseq, not at Unicode's other breaks.

    Raises ConfigurationError for a file that cannot be read, with the line number if it is not UTF-8.
    """
    if not os.path.isfile(path):  # reading a pipe could block forever
        raise ConfigurationError(f"{path} cannot be read (it does not exist, or is not a file); give another path")
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}, line {number} is not UTF-8; convert the file") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror})") from None
    return [*lines, rest] if rest else lines
