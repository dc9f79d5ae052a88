"""The IWSLT'14 recipe, on small files in its format."""

import pytest
from rich.console import Console

pytest.importorskip("sacremoses")

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.session import main
from recipes.iwslt14_de_en.__main__ import RECIPE, make_text
from recipes.iwslt14_de_en.raw_text import TESTS, read_test, read_training


@pytest.fixture
def raw(tmp_path):
    """A folder with the unpacked archive: 47 training pairs and 5 test pairs."""
    folder = tmp_path / "de-en"
    folder.mkdir()
    for language, word in (("de", "Ein Satz."), ("en", "A Sentence.")):
        lines = ["<url>http://x</url>", "<talkid>1</talkid>", f"<title> {word}</title>", *[word] * 46]
        (folder / f"train.tags.de-en.{language}").write_text("\n".join(lines) + "\n")
        for name in TESTS:
            (folder / f"{name}.de-en.{language}.xml").write_text(f'<doc>\n<seg id="1"> {word} </seg>\n</doc>\n')
    return tmp_path


def test_text_is_lowercased_and_tokenised_and_every_23rd_pair_held_out(raw, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    make_text(lambda: (read_training(raw), read_test(raw)), 1, folder, Console(quiet=True))
    counts = {split: (folder / "tokens" / f"{split}.de").read_text().splitlines() for split in ("train", "valid", "test")}
    assert {split: len(lines) for split, lines in counts.items()} == {"train": 45, "valid": 2, "test": 5}
    assert set(sum(counts.values(), [])) == {"ein satz ."}
    assert (folder / "raw" / "test.en").read_text() == "A Sentence.\n" * 5


def test_a_missing_test_set_is_named(raw):
    (raw / "de-en" / f"{TESTS[1]}.de-en.en.xml").unlink()
    with pytest.raises(ConfigurationError, match="nor its de-en/IWSLT14.TEDX.dev2012.de-en.en.xml"):
        read_test(raw)


def test_dry_run_prints_every_step(tmp_path, capsys):
    for action in ("prepare", "train", "evaluate"):
        main(RECIPE, [action, "--dry-run", "--gpus", "1", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "de-en.tgz" in said and "10,000 sentencepiece BPE pieces; fairseq-preprocess" in said and "fairseq-generate" in said
