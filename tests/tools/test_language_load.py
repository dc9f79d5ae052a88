"""Expert load by target language, compared with running the model on one sentence at a time."""

import math
import random

import pytest
import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import moe_layers
from fairseq_sparsemixer.tools.language_load import LanguageLoad, language_load, mutual_information
from fairseq_sparsemixer.tools.sentences import load_model, make_sample

LANGUAGES = ("de", "fr", "tr")


def write_pairs(folder, split, count, tagged=True):
    rng = random.Random(split)
    sources, targets = [], []
    for number in range(count):
        words = [f"w{rng.randrange(12)}" for _ in range(rng.randrange(1, 7))]
        sources.append(" ".join(([f"<2{LANGUAGES[number % 3]}>"] if tagged else []) + words))
        targets.append(" ".join(words + words[:1]))
    (folder / f"{split}.en").write_text("\n".join(sources) + "\n")
    (folder / f"{split}.xx").write_text("\n".join(targets) + "\n")
    return list(zip(sources, targets))


@pytest.fixture(scope="module")
def tagged(run_fairseq, tmp_path_factory):
    """(folder of binarised data, its test pairs)."""
    folder = tmp_path_factory.mktemp("tagged")
    pairs = [write_pairs(folder, split, count) for split, count in (("train", 30), ("valid", 6), ("test", 10))][-1]
    prefixes = [word for split in ("train", "valid", "test") for word in (f"--{split}pref", folder / split)]
    run_fairseq(
        "preprocess", "--source-lang", "en", "--target-lang", "xx", "--joined-dictionary", *prefixes,
        "--destdir", folder / "bin", "--workers", 1,
    )  # fmt: skip
    return folder / "bin", pairs


@pytest.fixture
def checkpoint(train, tagged, tmp_path):
    """checkpoint(router, flag, ...) -> the path of a model trained for one epoch."""

    def make(router, *flags):
        few = ("--required-batch-size-multiple", 1, "--max-epoch", 1, "--moe-freq", 1)
        train("--source-lang", "en", "--target-lang", "xx", "--router", router, *few, *flags, data=tagged[0])
        return str(tmp_path / "run" / "checkpoint_last.pt")

    return make


@pytest.mark.parametrize("router, flags", [("switch", []), ("gshard", []), ("dense_st", ["--moe-top-k", 2])])
def test_counts_equal_those_of_single_sentences(checkpoint, tagged, router, flags):
    path = checkpoint(router, *flags)
    load = language_load(path)
    model, _, task = load_model(path, None)
    model.float()
    expected = {language: torch.zeros(len(moe_layers(model)), 4, dtype=torch.long) for language in LANGUAGES}
    for source, target in tagged[1]:
        sample = make_sample(task, source, target)
        with torch.no_grad():
            model(**sample["net_input"])
        for index, layer in enumerate(moe_layers(model)):
            for experts in layer.routing.expert_index[:, : layer.routing.num_chosen].tolist():
                for expert in experts:
                    expected[source[2:4]][index, expert] += 1
    assert load.languages == sorted(LANGUAGES)
    for index in range(len(load.layers)):
        assert load.counts[index] == [expected[language][index].tolist() for language in load.languages]


def test_layers_are_named_in_order(checkpoint):
    layers = language_load(checkpoint("switch"), split="valid").layers
    assert layers[0].startswith("encoder.layers.0") and layers[-1].startswith("decoder.layers")


def test_a_model_without_experts_is_refused(checkpoint):
    with pytest.raises(ConfigurationError, match="not a translation model with experts"):
        language_load(checkpoint("dense"))


def test_sentences_without_a_tag_are_refused(checkpoint, run_fairseq, tagged, tmp_path):
    path = checkpoint("switch")
    folder = tmp_path / "plain"
    folder.mkdir()
    write_pairs(folder, "test", 4, tagged=False)
    dictionary = tagged[0] / "dict.en.txt"
    run_fairseq(
        "preprocess", "--source-lang", "en", "--target-lang", "xx", "--srcdict", dictionary, "--tgtdict", dictionary,
        "--testpref", folder / "test", "--destdir", folder / "bin", "--workers", 1,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="begin it with a tag for its language, such as <2de>"):
        language_load(path, str(folder / "bin"))


def test_mutual_information_matches_known_tables():
    assert mutual_information([[5, 0], [0, 5]]) == pytest.approx(1)  # the expert determines the language
    assert mutual_information([[3, 9], [1, 3]]) == pytest.approx(0)  # independent
    quarter = 0.75 * math.log2(0.75 / 0.5) + 0.25 * math.log2(0.25 / 0.5)  # three of four tokens on the language's own expert
    assert mutual_information([[3, 1], [1, 3]]) == pytest.approx(quarter)
    assert mutual_information([[0, 0], [0, 0]]) == 0


def test_the_shares_of_a_language_sum_to_one():
    load = LanguageLoad(["encoder.layers.0"], ["de", "fr"], [[[3, 1], [0, 0]]])
    assert load.shares() == [[[0.75, 0.25], [0.0, 0.0]]]
    assert load.information() == [0.0]


def test_the_plot_has_a_heatmap_per_layer():
    from fairseq_sparsemixer.tools.plotting import draw_language_load, drawn

    load = LanguageLoad(["encoder.layers.0", "decoder.layers.0"], ["de", "fr"], [[[3, 1], [0, 2]], [[1, 1], [1, 1]]])
    figure = draw_language_load([("switch", load), ("sparsemixer", load)])
    images = [axes.images[0].get_array().tolist() for axes in figure.axes if axes.images and axes.get_title()]
    assert images == 2 * load.shares()
    assert drawn(figure).startswith(b"\x89PNG")


def test_divergences_match_a_known_table_and_their_mean_over_tokens_is_the_information():
    load = LanguageLoad(["encoder.layers.0"], ["de", "fr", "tr"], [[[6, 2], [1, 3], [0, 0]]])
    german = 6 / 8 * math.log2((6 / 8) / (7 / 12)) + 2 / 8 * math.log2((2 / 8) / (5 / 12))
    french = 1 / 4 * math.log2((1 / 4) / (7 / 12)) + 3 / 4 * math.log2((3 / 4) / (5 / 12))
    assert load.divergences() == [[pytest.approx(german), pytest.approx(french), 0]]
    assert load.information() == [pytest.approx((8 * german + 4 * french) / 12)]
