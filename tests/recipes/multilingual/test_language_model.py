"""language_model.py on a few sentences."""

import pytest
from fairseq.data import Dictionary, indexed_dataset

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.multilingual.language_model import main, tagged

SOURCES = ["▁ <2de> ▁one", "▁ <2pt-br> ▁two ▁three"]
TARGETS = ["▁eins", "▁dois ▁três"]


@pytest.fixture
def data(tmp_path):
    """The quickstart's data folder, with its pieces only."""
    folder = tmp_path / "data" / "pieces"
    folder.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        (folder / f"{split}.en").write_text("\n".join(SOURCES) + "\n", encoding="utf-8")
        (folder / f"{split}.xx").write_text("\n".join(TARGETS) + "\n", encoding="utf-8")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_line_is_the_language_and_the_target_sentence(data, tmp_path):
    main([str(data), str(tmp_path / "lm")])
    expected = ["<2de> ▁eins", "<2pt-br> ▁dois ▁três"]
    assert (tmp_path / "lm" / "pieces" / "valid").read_text(encoding="utf-8").splitlines() == expected
    words = Dictionary.load(str(tmp_path / "lm" / "bin" / "dict.txt"))
    binary = indexed_dataset.make_dataset(str(tmp_path / "lm" / "bin" / "train"), impl="mmap")
    assert [words.string(binary[i]) for i in range(2)] == expected


def test_a_source_without_a_language_is_refused(data):
    (data / "pieces" / "valid.en").write_text("▁a ▁house\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="valid.en has a sentence without a language tag; make it with make quickstart"):
        list(tagged(data / "pieces", "valid"))
