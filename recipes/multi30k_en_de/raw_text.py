"""Multi30k's raw text (English-German): one sentence per line, gzipped or not, `train.en.gz`, `val.de.gz`, ..."""

from pathlib import Path

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.corpus import LANGUAGES, Corpus, find_file, read_file, read_pairs

FILES = {"train": "train", "valid": "val", "test": "test_2016_flickr"}


def read_multi30k(folder: Path) -> Corpus:
    """The three splits in folder. Raises ConfigurationError, with file and line, if text is not parallel."""
    corpus = {}
    for split, name in FILES.items():
        corpus[split] = list(read_pairs(*(read_file(find_file(folder, f"{name}.{language}")) for language in LANGUAGES)))
        if not corpus[split]:
            raise ConfigurationError(f"{name} in {folder} is empty; fetch the files again")
    return corpus
