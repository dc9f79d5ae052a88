"""fairseq's translation_multi_simple_epoch: sampling of language pairs, language tokens, resuming, ranks."""

import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from decoding import check_scores, decode, log_probabilities
from fitting import EXPERTS, TRANSLATION, bits, fit, weights
from ranks import rank_number, run_ranks
from texts import draw_sentences, write_dictionary, write_sentences

pytestmark = pytest.mark.slow

SENTENCES = {"de-en": 54, "fr-en": 6}  # sentence pairs per file pair; de-en is used in both directions
PAIRS = {("de", "en"): 54, ("en", "de"): 54, ("fr", "en"): 6}
TASK = (
    "--task translation_multi_simple_epoch --langs de,en,fr --lang-pairs de-en,en-de,fr-en --encoder-langtok src"
    " --decoder-langtok --sampling-method temperature --sampling-temperature 2 --batch-size 8"
).split()
FLAGS = [*TASK, *TRANSLATION, *EXPERTS]


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
    return folder, fit(data, folder, *FLAGS, "--virtual-epoch-size", 100, "--virtual-data-size", 100, updates=16)


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


def test_the_loss_is_the_cross_entropy_of_the_batch(whole_run):
    _, run = whole_run
    for update in (0, 9):
        (sample,) = run.batches[update]
        expected = bits(run.models[update], sample, run.trainer.task.target_dictionary.pad())
        assert run.losses[update] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one(whole_run, data, tmp_path):
    folder, run = whole_run
    epoch = ("--virtual-epoch-size", 100, "--virtual-data-size", 100)
    first = fit(data, tmp_path, *FLAGS, *epoch, updates=6)  # stops in the middle of the first epoch
    second = fit(data, tmp_path, *FLAGS, *epoch, updates=16)
    assert first.losses + second.losses == run.losses
    expected, found = (weights(path / "checkpoint_last.pt") for path in (folder, tmp_path))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_both_directions_are_translated_with_their_language_token(whole_run, data, tmp_path):
    folder, run = whole_run
    words = run.trainer.task.target_dictionary
    for source, target in (("de", "en"), ("en", "de")):
        inference = (*TASK[:-2], "-s", source, "-t", target, "--beam", 2)
        found = decode(data, folder / "checkpoint_last.pt", tmp_path, *inference)
        assert len(found) == 4
        for hypothesis in found:
            assert words[hypothesis.source[0]] == f"__{source}__" and words[hypothesis.tokens[0]] == f"__{target}__"
            assert f"__{target}__" not in hypothesis.text
        check_scores(found, partial(log_probabilities, run.models[-1]))


def rank(data: Path, save_dir: Path, meeting: Path):
    launch = (
        f"--distributed-world-size 2 --distributed-init-method file://{meeting} --distributed-rank {rank_number()}"
        " --device-id 0 --distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
    )
    return fit(data, save_dir, *FLAGS, *launch.split(), updates=6).losses


@pytest.mark.distributed
def test_two_ranks_equal_one_process(data, tmp_path):
    alone = fit(data, tmp_path / "alone", *FLAGS, "--update-freq", 2, updates=6)
    losses = run_ranks(2, rank, data, tmp_path / "both", tmp_path / "meeting", group=False)
    assert losses[0] == losses[1] == pytest.approx(alone.losses, rel=1e-5)
    expected, found = (weights(tmp_path / name / "checkpoint_last.pt") for name in ("alone", "both"))
    for name in expected:
        if not name.endswith("k_proj.bias"):  # does not change attention: its gradient is rounding error, which Adam amplifies
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
