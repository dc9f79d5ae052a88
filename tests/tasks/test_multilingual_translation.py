"""Multilingual translation: translation_multi_simple_epoch with language tokens, and translation with tags in the source."""

import json
import math
import re
from collections import Counter, defaultdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from decoding import check_scores, decode, log_probabilities
from fairseq.models import distributed_fairseq_model
from fitting import EXPERTS, TRANSLATION, bits, fit, weights
from ranks import rank_number, run_ranks
from texts import WORDS, draw_sentences, write_dictionary, write_sentences
from torch.nn.parallel import DistributedDataParallel

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.languages import TAG
from fairseq_sparsemixer.moe.layer import named_moe_layers

pytestmark = pytest.mark.slow

SENTENCES = {"de-en": 54, "fr-en": 6}  # sentence pairs per file pair; de-en is used in both directions
PAIRS = {("de", "en"): 54, ("en", "de"): 54, ("fr", "en"): 6}
TASK = (
    "--task translation_multi_simple_epoch --langs de,en,fr --lang-pairs de-en,en-de,fr-en --encoder-langtok src"
    " --decoder-langtok --sampling-method temperature --sampling-temperature 2 --batch-size 8"
).split()
FLAGS = [*TASK, *TRANSLATION, *EXPERTS]
EPOCH = ("--virtual-epoch-size", 100, "--virtual-data-size", 100)
TAGGED = ["--task", "translation", "-s", "en", "-t", "xx", "--batch-size", 8, *TRANSLATION, *EXPERTS]
LANGUAGES = ("de", "fr")


def load_by(kind, folder):
    """Flags for a line per update with the load by language."""
    return ("--moe-load-file", folder / "load.jsonl", "--moe-load-interval", 1, "--moe-load-languages", kind)


def lines(folder):
    return [json.loads(line) for line in (folder / "load.jsonl").read_text().splitlines()]


def count_sentence_by_sentence(model, sample, language_of, padding):
    """{language: [L][E]} of a batch, from the model on one sentence at a time; language_of(source, given) names its language."""
    model.eval()
    counts = defaultdict(lambda: [[0] * layer.gate.num_experts for _, layer in named_moe_layers(model)])
    inputs = sample["net_input"]
    for source, given in zip(inputs["src_tokens"], inputs["prev_output_tokens"]):
        source, given = source[source.ne(padding)], given[given.ne(padding)]
        with torch.no_grad():
            model(source.unsqueeze(0), torch.tensor([len(source)]), given.unsqueeze(0))
        for row, (_, layer) in zip(counts[language_of(source, given)], named_moe_layers(model)):
            for expert in layer.routing.expert_index.flatten().tolist():
                row[expert] += 1
    return counts


def check_lines(found, run, language_of):
    """Assert that each line has the counts of its update's batch, and that languages sum to the load."""
    assert found and len(found) == len(run.batches)
    for line, model, (sample,) in zip(found, run.models, run.batches):
        expected = count_sentence_by_sentence(model, sample, language_of, run.trainer.task.source_dictionary.pad())
        assert sorted(line["languages"]) == sorted(expected)
        for index, (load, rows) in enumerate(zip(line["load"], line["language_load"])):
            assert rows == [expected[name][index] for name in line["languages"]]
            assert load == [sum(column) for column in zip(*rows)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Random words in three languages, with one dictionary."""
    folder = tmp_path_factory.mktemp("languages")
    for language in ("de", "en", "fr"):
        dictionary = write_dictionary(folder / f"dict.{language}.txt")
    for pair, count in SENTENCES.items():
        for part, number in (("train", count), ("valid", 4)):
            for seed, language in enumerate(pair.split("-")):
                write_sentences(folder / f"{part}.{pair}.{language}", draw_sentences(number, seed), dictionary)
    return folder


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """(folder, run) of an epoch of 100 sentences and some updates of the next one, in one process."""
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(data, folder, *FLAGS, *EPOCH, *load_by("pair", folder), updates=16)


def test_pairs_are_sampled_by_temperature_and_marked_with_language_tokens(whole_run):
    _, run = whole_run
    words = run.trainer.task.source_dictionary
    drawn, batches = Counter(), iter(run.batches)
    while sum(drawn.values()) < 100:
        for sample in next(batches):
            inputs = sample["net_input"]
            for source, length, given, target in zip(
                inputs["src_tokens"], inputs["src_lengths"], inputs["prev_output_tokens"], sample["target"]
            ):
                first = source[source.ne(words.pad())][0]  # padded on the left
                assert given[1] == target[0] and length == source.ne(words.pad()).sum()
                drawn[words[first].strip("_"), words[target[0]].strip("_")] += 1
    total = sum(math.sqrt(count) for count in PAIRS.values())
    assert sum(drawn.values()) == 100 and drawn.keys() == PAIRS.keys()
    for pair, count in PAIRS.items():
        assert drawn[pair] == pytest.approx(100 * math.sqrt(count) / total, abs=len(PAIRS)), "p_i ~ n_i^(1/T), T = 2"


def test_each_virtual_epoch_has_its_number_of_sentences(data, tmp_path):
    run = fit(data, tmp_path, *FLAGS, "--virtual-epoch-size", 40, "--virtual-data-size", 80, "--max-epoch", 3, updates=100)
    done = [*accumulate(len(sample["target"]) for (sample,) in run.batches)]
    assert {40, 80}.issubset(done) and done[-1] == 120  # no batch crosses the end of an epoch
    epoch = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["extra_state"]["train_iterator"]["epoch"]
    assert epoch == 4  # the next one


def test_the_loss_is_the_cross_entropy_of_the_batch(whole_run):
    _, run = whole_run
    for update in (0, 9):
        (sample,) = run.batches[update]
        expected = bits(run.models[update], sample, run.trainer.task.target_dictionary.pad())
        assert run.losses[update] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one(whole_run, data, tmp_path):
    folder, run = whole_run
    flags = (*FLAGS, *EPOCH, *load_by("pair", tmp_path))
    first = fit(data, tmp_path, *flags, updates=6)  # stops in the middle of the first epoch
    second = fit(data, tmp_path, *flags, updates=16)
    assert first.losses + second.losses == run.losses
    assert lines(tmp_path) == lines(folder)
    expected, found = (weights(path / "checkpoint_last.pt") for path in (folder, tmp_path))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_load_file_counts_tokens_by_pair(whole_run):
    folder, run = whole_run
    words = run.trainer.task.source_dictionary
    check_lines(lines(folder), run, lambda source, given: f"{words[source[0]]}-{words[given[1]]}".replace("_", ""))
    assert {name for line in lines(folder) for name in line["languages"]} == {"-".join(pair) for pair in PAIRS}


@pytest.mark.parametrize("kind, place", [("source", 0), ("target", 1)])
def test_the_load_file_counts_tokens_by_one_side(data, tmp_path, kind, place):
    run = fit(data, tmp_path, *FLAGS, *load_by(kind, tmp_path), updates=3)
    words = run.trainer.task.source_dictionary
    check_lines(lines(tmp_path), run, lambda *sides: words[sides[place][place]].strip("_"))


@pytest.mark.parametrize("given, sentence", [
    (["--moe-load-languages", "pair"], "--moe-load-languages pair needs a file; give --moe-load-file, too"),
    (load_by("both", Path("x")), "--moe-load-languages both is unknown; choose source, target or pair"),
    (
        [*load_by("source", Path("x")), "--encoder-langtok", "tgt"],
        "--moe-load-languages source needs a token for the source language in each sentence, and there is none:"
        " with --task translation_multi_simple_epoch, train with --encoder-langtok src",
    ),
])  # fmt: skip
def test_languages_that_cannot_be_counted_are_refused(data, tmp_path, given, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        fit(data, tmp_path, *FLAGS, *given, updates=1)


def test_each_direction_is_translated_with_their_language_token(whole_run, data, tmp_path):
    folder, run = whole_run
    words = run.trainer.task.target_dictionary
    for source, target in PAIRS:
        inference = (*TASK[:-2], "-s", source, "-t", target, "--beam", 2)
        found = decode(data, folder / "checkpoint_last.pt", tmp_path, *inference)
        assert len(found) == 4
        for hypothesis in found:
            assert words[hypothesis.source[0]] == f"__{source}__" and words[hypothesis.tokens[0]] == f"__{target}__"
            assert f"__{target}__" not in hypothesis.text
        check_scores(found, partial(log_probabilities, run.models[-1]))


@pytest.fixture(scope="module")
def tagged(tmp_path_factory) -> Path:
    """Random English into German and French, with tags in front of the source, as one pair of files."""
    from fairseq.data import Dictionary

    folder = tmp_path_factory.mktemp("tagged")
    dictionary = Dictionary()
    for word in [*map(tag, LANGUAGES), *WORDS]:
        dictionary.add_symbol(word)
    for side in ("en", "xx"):
        dictionary.save(str(folder / f"dict.{side}.txt"))
    for part, count in (("train", 60), ("valid", 6)):
        sources = draw_sentences(count, seed=0)
        marked = [[tag(LANGUAGES[index % 2]), *words] for index, words in enumerate(sources)]
        write_sentences(folder / f"{part}.en-xx.en", marked, dictionary)
        write_sentences(folder / f"{part}.en-xx.xx", draw_sentences(count, seed=1), dictionary)
    return folder


def tag(language):
    return f"<2{language}>"


@pytest.fixture(scope="module")
def tagged_run(tagged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagged_run")
    return folder, fit(tagged, folder, *TAGGED, *load_by("target", folder), updates=12)


def test_the_load_file_counts_tokens_by_tag(tagged_run):
    folder, run = tagged_run
    words = run.trainer.task.source_dictionary
    check_lines(lines(folder), run, lambda source, _: TAG.fullmatch(words[source[0]]).group(1))


def test_a_resumed_run_with_tags_equals_the_uninterrupted_one(tagged_run, tagged, tmp_path):
    folder, run = tagged_run
    first, second = (fit(tagged, tmp_path, *TAGGED, *load_by("target", tmp_path), updates=count) for count in (5, 12))
    assert first.losses + second.losses == run.losses and lines(tmp_path) == lines(folder)


def test_each_tagged_sentence_is_translated(tagged_run, tagged, tmp_path):
    folder, run = tagged_run
    words = run.trainer.task.source_dictionary
    found = decode(tagged, folder / "checkpoint_last.pt", tmp_path, "-s", "en", "-t", "xx", "--beam", 2)
    assert [words[hypothesis.source[0]] for hypothesis in found] == 3 * [*map(tag, LANGUAGES)]
    check_scores(found, partial(log_probabilities, run.models[-1]))


def rank(data: Path, save_dir: Path, meeting: Path, backend: str, flags, updates: int = 6):
    launch = (
        f"--distributed-world-size 2 --distributed-init-method file://{meeting} --distributed-rank {rank_number()}"
        f" --device-id 0 --distributed-no-spawn --distributed-backend gloo --ddp-backend {backend}"
    )
    with patch.object(distributed_fairseq_model, "DistributedDataParallel", on_cpu):
        return fit(data, save_dir, *flags, *launch.split(), updates=updates).losses


def on_cpu(module, device_ids, output_device, **options):
    """torch's DistributedDataParallel without the GPU's number that fairseq gives it."""
    return DistributedDataParallel(module, **options)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend, task, kind",
    [("legacy_ddp", [*FLAGS, *EPOCH], "pair"), ("legacy_ddp", FLAGS, "pair"), ("pytorch_ddp", TAGGED, "target")],
    ids=["tokens", "epochs of the data's size", "tags"],
)
def test_two_ranks_equal_one_process(data, tagged, tmp_path, backend, task, kind):
    data = data if kind == "pair" else tagged
    alone = fit(data, tmp_path / "alone", *task, "--update-freq", 2, *load_by(kind, tmp_path / "alone"), updates=6)
    flags, both = [*task, *load_by(kind, tmp_path / "both")], tmp_path / "both"
    started = run_ranks(2, rank, data, both, tmp_path / "first", backend, flags, 4, group=False)
    resumed = run_ranks(2, rank, data, both, tmp_path / "second", backend, flags, group=False)
    losses = [[*before, *after] for before, after in zip(started, resumed)]
    assert losses[0] == losses[1] == pytest.approx(alone.losses, rel=1e-5)
    expected, found = (weights(tmp_path / name / "checkpoint_last.pt") for name in ("alone", "both"))
    for name in expected:
        if not name.endswith("k_proj.bias"):  # does not change attention: its gradient is rounding error, which Adam amplifies
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    assert lines(both) == lines(tmp_path / "alone")
