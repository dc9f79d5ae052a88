"""The WMT'14 recipe, on small archives in its format."""

import io
import tarfile

import pytest
from rich.console import Console

pytest.importorskip("sacremoses")

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.session import main
from recipes.wmt14_en_de.__main__ import CONFIG, RECIPE, make_text
from recipes.wmt14_en_de.raw_text import CORPORA, TEST, read_newstest2014, read_training


@pytest.fixture
def raw(tmp_path):
    """A folder with the four archives: 20 training pairs per corpus, 2 test pairs."""

    def archive(name, **files):
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            for member, text in files.items():
                entry, content = tarfile.TarInfo(member), text.encode()
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

    for name, stem in CORPORA.items():
        lines = {"en": "A well-known house.\n", "de": "Ein „bekanntes“ Haus.\n"}
        archive(name, **{f"{stem}.{language}": line * 20 for language, line in lines.items()})
    segments = '<doc id="1">\n<seg id="1">{}</seg>\n<seg id="2"> {} </seg>\n</doc>\n'
    texts = segments.format("It’s me.", "Yes."), segments.format("Ich bin’s.", "Ja.")
    archive("test-full.tgz", **dict(zip(TEST, texts)))
    return tmp_path


def test_text_is_tokenised_and_split_and_the_raw_test_set_is_kept(raw, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    make_text(lambda: (read_training(raw), read_newstest2014(raw)), 20, 1, folder, Console(quiet=True))
    names = ("train.en", "valid.de", "test.en")
    tokens = {name: (folder / "tokens" / name).read_text(encoding="utf-8").splitlines() for name in names}
    assert len(tokens["train.en"]) == 57 and tokens["train.en"][0] == "A well @-@ known house ."
    assert tokens["valid.de"] == ["Ein &quot; bekanntes &quot; Haus ."] * 3
    assert tokens["test.en"] == ["It &apos;s me .", "Yes ."]
    assert (folder / "raw" / "test.de").read_text(encoding="utf-8") == "Ich bin’s.\nJa.\n"


def test_a_test_set_without_a_segment_is_refused(raw):
    (raw / "test-full").mkdir()
    (raw / TEST[1]).write_text('<seg id="1">Ja.</seg>\n<seg id="2"> </seg>\n')
    with pytest.raises(ConfigurationError, match="newstest2014-deen-ref.de.sgm .segments., line 2 is empty"):
        read_newstest2014(raw)


@pytest.mark.parametrize("gpus, update_freq", [(1, 16), (8, 2), (16, 1)])
def test_the_plan_keeps_the_papers_batch_on_any_number_of_gpus(gpus, update_freq, tmp_path, capsys):
    for action in ("prepare", "train", "evaluate"):
        main(RECIPE, [action, "--dry-run", "--gpus", str(gpus), "--num-experts", "16", "--out", str(tmp_path)])
    said = " ".join(capsys.readouterr().out.split())
    assert "europarl-v7.tgz" in said and "model.num_experts=16" in said
    assert f"optimization.update_freq=[{update_freq}]" in said and "dataset.max_tokens=8192" in said
    assert "--beam 4 --lenpen 0.6" in said and "averages the last 5 checkpoints" in said
    assert not list(tmp_path.iterdir())


def test_the_settings_match_the_paper():
    import yaml

    cfg = yaml.safe_load(CONFIG.read_text())
    assert cfg["model"]["_name"] == "transformer_moe_base" and cfg["model"]["moe_freq"] == 2 and cfg["model"]["jitter_eps"] == 0.1
    assert cfg["criterion"]["label_smoothing"] == 0.1 and cfg["criterion"]["moe_balance_loss_weight"] == 0.01
    assert cfg["optimization"]["lr"] == [0.0007] and cfg["lr_scheduler"]["warmup_updates"] == 8000
    assert cfg["dataset"]["max_tokens"] * cfg["optimization"]["update_freq"][0] == 8192 * 16
