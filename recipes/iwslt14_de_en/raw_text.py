"""IWSLT'14 German-English in the organisers' format: training talks with tags, test sets in XML."""

from itertools import chain
from pathlib import Path
from typing import List

from recipes.common.corpus import Lines, Pair, read_member, read_pairs
from recipes.wmt14_en_de.raw_text import segments

LANGUAGES = ("de", "en")  # source, target
ARCHIVE = "de-en.tgz"
URLS = {ARCHIVE: "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"}  # as in fairseq's prepare-iwslt14.sh
TESTS = ("IWSLT14.TED.dev2010", "IWSLT14.TEDX.dev2012", "IWSLT14.TED.tst2010", "IWSLT14.TED.tst2011", "IWSLT14.TED.tst2012")
ABOUT = ("<url>", "<talkid>", "<keywords>")  # lines of metadata, without sentences
TAGS = ("<title>", "</title>", "<description>", "</description>")  # enclose sentences


def read_training(folder: Path) -> List[Pair]:
    """The training pairs: the sentences, titles and descriptions of talks."""
    members = (f"de-en/train.tags.de-en.{language}" for language in LANGUAGES)
    return list(read_pairs(*(_sentences(read_member(folder, ARCHIVE, member)) for member in members), may_be_empty=True))


def read_test(folder: Path) -> List[Pair]:
    """The five test sets concatenated, as is usual for this task."""
    sets = (
        read_pairs(*(segments(read_member(folder, ARCHIVE, f"de-en/{name}.de-en.{language}.xml")) for language in LANGUAGES))
        for name in TESTS
    )
    return list(chain.from_iterable(sets))


def _sentences(text: Lines) -> Lines:
    def lines():
        for line in text.lines:
            if not any(tag in line for tag in ABOUT):
                for tag in TAGS:
                    line = line.replace(tag, "")
                yield line.strip()

    return Lines(f"{text.name} (sentences)", lines())
