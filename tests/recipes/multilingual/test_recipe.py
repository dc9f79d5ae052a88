"""The multilingual recipe: whole at its smoke size, and OPUS-100's archives in small."""

import io
import json
import tarfile

import pytest
from sacrebleu.metrics import BLEU

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.language_table import LanguageLoad
from recipes.common.corpus import Pair
from recipes.common.session import main
from recipes.multilingual.__main__ import RECIPE
from recipes.multilingual.by_language import read_languages, scores
from recipes.multilingual.raw_text import LANGUAGES, SHA256, archive_of, read_opus100, urls_of

RUN = "switch-e4-seed1"
SIDES = {
    "de": {"en": "A house.\n\nTwo  dogs.\n", "de": "Ein Haus.\nLeer.\nZwei Hunde.\n"},
    "fr": {"en": "A house.\nA cat.\nTwo dogs.\n", "fr": "Une maison.\nUn chat.\nDeux chiens.\n"},
}


@pytest.fixture
def raw(tmp_path):
    """A folder with archives of three pairs in every split; a German training pair lacks its source."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for language, sides in SIDES.items():
        pair = "-".join(sorted(("en", language)))
        with tarfile.open(folder / archive_of(language), "w:gz") as tar:
            for part in ("train", "dev", "test"):
                for side, text in sides.items():
                    entry, content = (
                        tarfile.TarInfo(f"opus-100-corpus/v1.0/supervised/{pair}/opus.{pair}-{part}.{side}"),
                        text.encode(),
                    )
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def test_archives_become_tagged_pairs_without_empty_sides_but_the_whole_test_set(raw):
    corpus = {split: list(pairs) for split, pairs in read_opus100(raw, ["de", "fr"]).items()}
    assert corpus["train"] == corpus["valid"] == [
        Pair("<2de> A house.", "Ein Haus."),
        Pair("<2de> Two dogs.", "Zwei Hunde."),
        Pair("<2fr> A house.", "Une maison."),
        Pair("<2fr> A cat.", "Un chat."),
        Pair("<2fr> Two dogs.", "Deux chiens."),
    ]  # fmt: skip
    assert [pair.target for pair in corpus["test"]] == [
        "Ein Haus.",
        "Leer.",
        "Zwei Hunde.",
        "Une maison.",
        "Un chat.",
        "Deux chiens.",
    ]


def test_the_number_of_training_pairs_is_limited_for_each_language(raw):
    corpus = {split: list(pairs) for split, pairs in read_opus100(raw, ["fr", "de"], 1).items()}
    assert [pair.source for pair in corpus["train"]] == ["<2fr> A house.", "<2de> A house."]
    assert len(corpus["valid"]) == 5 and len(corpus["test"]) == 6


def test_a_missing_archive_is_named(raw):
    with pytest.raises(ConfigurationError, match="neither opus-100-corpus-en-tr-v1.0.tar.gz nor its"):
        list(read_opus100(raw, ["de", "tr"])["train"])


def test_every_language_has_an_address_and_a_checksum():
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 94 and {"de", "fr", "zh", "zu"} < set(LANGUAGES) and "en" not in LANGUAGES
    assert set(urls_of(LANGUAGES)) == set(SHA256) and all(len(bytes.fromhex(checksum)) == 32 for checksum in SHA256.values())
    assert urls_of(["fr"]) == {
        "opus-100-corpus-en-fr-v1.0.tar.gz": "https://object.pouta.csc.fi/OPUS-100/v1.0/opus-100-corpus-en-fr-v1.0.tar.gz"
    }


@pytest.mark.parametrize("flags, message", [
    ("--targets de xx", "--targets xx is not in OPUS-100, or has no test set there; choose from af, "),
    ("--targets de zh --cldr", "--targets zh is not in the CLDR corpus; choose from cs, de, "),
    ("--targets de de", "--targets de is one language; give two or more"),
    ("--cldr --raw-dir raw", "--cldr makes its own text; leave out --raw-dir"),
    ("--pairs 0", "--pairs 0 must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_prepared_is_refused_before_anything_is_done(flags, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        main(RECIPE, ["prepare", "--out", str(tmp_path / "out"), *flags.split()])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, folder", [
    ([], "multilingual"), (["--cldr"], "multilingual-cldr"), (["--smoke"], "multilingual-smoke"),
])  # fmt: skip
def test_each_choice_of_data_has_a_folder_and_only_prepare_downloads(flags, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for action in ("prepare", "train", "evaluate"):
        main(RECIPE, [action, "--dry-run", "--gpus", "8", *flags])
        said = " ".join(capsys.readouterr().out.split())
        assert f"runs/{folder}/" in said
        assert ("downloads opus-100-corpus-de-en" in said) == (action == "prepare" and not flags)
    assert not list(tmp_path.iterdir())


def test_the_batch_is_the_same_on_one_gpu_and_on_eight(capsys, tmp_path):
    for gpus, update_freq in ((1, 8), (8, 1)):
        main(RECIPE, ["train", "--dry-run", "--gpus", str(gpus), "--out", str(tmp_path)])
        said = " ".join(capsys.readouterr().out.split())
        assert f"optimization.update_freq=[{update_freq}]" in said and "dataset.max_tokens=8192" in said


def test_scores_are_of_each_language_and_their_mean():
    hypotheses, references = ["a b c d", "e f g h", "a b c d e", "我有一只狗"], ["a b c d", "x y z", "a b c d f", "我有一只狗"]
    found = scores(["de", "fr", "de", "zh"], hypotheses, references)
    german = BLEU().corpus_score([hypotheses[0], hypotheses[2]], [[references[0], references[2]]]).score
    assert found["languages"]["de"]["bleu"] == pytest.approx(german) and found["languages"]["de"]["sentences"] == 2
    assert found["languages"]["zh"]["bleu"] == pytest.approx(100) and "tok:zh" in found["bleu_signature_zh"]
    assert "tok:13a" in found["bleu_signature"]
    assert found["bleu"] == pytest.approx((german + found["languages"]["fr"]["bleu"] + 100) / 3)


def test_the_experts_bits_of_a_language_are_the_mean_over_layers():
    load = LanguageLoad(["encoder.layers.0", "decoder.layers.0"], ["de", "fr"], [[[2, 0], [0, 2]], [[1, 1], [1, 1]]])
    found = scores(["de", "fr"], ["a", "b"], ["a", "b"], load)
    assert [found["languages"][language]["expert_bits"] for language in ("de", "fr")] == [0.5, 0.5]
    assert found["language_bits"] == 0.5


def test_a_test_sentence_without_a_tag_is_named(tmp_path):
    (tmp_path / "test.en").write_text("<2de> one\ntwo\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="test.en, line 2 does not begin with a tag"):
        read_languages(tmp_path / "test.en")


@pytest.mark.slow
def test_the_whole_recipe_at_its_smoke_size(tmp_path, capsys):
    from fairseq_sparsemixer.tools.runs import read_run

    small = ("--out", str(tmp_path), "--smoke", "--gpus", "0", "--router", "switch", "--num-experts", "4")
    main(RECIPE, ["prepare", *small, "--targets", "de", "fr", "tr"])
    main(RECIPE, ["train", *small, "--updates", "40"])
    main(RECIPE, ["evaluate", *small])
    assert "| tr " in capsys.readouterr().out
    results = json.loads((tmp_path / f"{RUN}-results.json").read_text())
    assert sorted(results["languages"]) == ["de", "fr", "tr"]
    for figures in results["languages"].values():
        assert figures["sentences"] == 10 and 0 <= figures["bleu"] <= 100 and 0 <= figures["chrf"] <= 100
        assert 0 <= figures["expert_bits"] <= 2  # of 4 experts
    assert (tmp_path / f"{RUN}-experts" / "language_load.png").read_bytes().startswith(b"\x89PNG")
    load = read_run(tmp_path / RUN).load
    assert load.languages.languages == ["de", "fr", "tr"] and load.layers == load.languages.layers


@pytest.mark.slow
def test_archives_are_prepared_with_every_tag_a_single_piece(raw, tmp_path):
    main(
        RECIPE,
        [
            "prepare",
            "--smoke",
            "--raw-dir",
            str(raw),
            "--targets",
            "de",
            "fr",
            "--out",
            str(tmp_path / "out"),
            "--vocabulary",
            "60",
        ],
    )
    pieces = (tmp_path / "out" / "data" / "pieces" / "test.en").read_text(encoding="utf-8").splitlines()
    assert len(pieces) == 6 and ["<2de>" in line.split() for line in pieces] == [True] * 3 + [False] * 3
    assert (tmp_path / "out" / "data" / "bin" / "test.en-xx.xx.idx").is_file()
