"""fairseq's online_backtranslation: the model translates its own batches between updates."""

from pathlib import Path

import pytest
import torch
from decoding import log_probabilities
from fitting import EXPERTS, TRANSLATION, bits, fit
from ranks import meeting_place, rank_number, run_ranks
from texts import draw_sentences, write_dictionary, write_sentences

pytestmark = pytest.mark.slow

FLAGS = [
    *"--task online_backtranslation --mono-langs de,en --valid-lang-pairs de-en --batch-size 4 --share-all-embeddings".split(),
    *"--no-epoch-checkpoints --disable-validation".split(), *TRANSLATION, *EXPERTS,
]  # fmt: skip
SHORTEST = 5  # minimum words per translation in this task


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Monolingual random words in two languages."""
    folder = tmp_path_factory.mktemp("mono")
    for name in ("dict.txt", "dict.de.txt", "dict.en.txt"):
        words = write_dictionary(folder / name)
    for seed, language in enumerate(("de", "en")):
        write_sentences(folder / language / "train", draw_sentences(24, seed), words)
        write_sentences(folder / f"valid.de-en.{language}", draw_sentences(4, seed), words)
    return folder


def greedy(model, source, first: int, length: int) -> list:
    """Greedy decoding after `first` with one forward pass per step; at least SHORTEST words."""
    words = torch.tensor([], dtype=torch.long)
    for step in range(length):
        given = torch.cat([words, words.new_zeros(1)])
        chances = log_probabilities(model, source, given, first=first)[-1]
        chances[1] = -torch.inf  # padding
        if step < SHORTEST:
            chances[2] = -torch.inf
        words = torch.cat([words, chances.argmax().view(1)])
        if words[-1] == 2:
            break
    return words.tolist()


def test_the_current_model_translates_and_trains_on_its_translation(data, tmp_path):
    run = fit(data, tmp_path, *FLAGS, updates=3)
    words = run.trainer.task.dictionary
    update = 2
    (sample,) = run.batches[update]
    model = run.models[update]
    for language, other in (("de", "en"), ("en", "de")):
        learnt = sample[f"{language}-BT"]
        for source, target, given in zip(
            learnt["net_input"]["src_tokens"], learnt["target"], learnt["net_input"]["prev_output_tokens"]
        ):
            target = target[target.ne(words.pad())]
            assert given[0] == words.index(f"__{language}__")
            assert source[0] == words.index(f"__{other}__"), "the translation starts with its language token"
            translation = source[1:][source[1:].ne(words.pad())].tolist()
            original = torch.cat([target.new_tensor([words.index(f"__{language}__")]), target])
            assert translation == greedy(model, original, words.index(f"__{other}__"), len(translation))
    counts = {name: part["ntokens"] for name, part in sample.items()}
    expected = sum(counts[name] * bits(model, part, words.pad()) for name, part in sample.items()) / sum(counts.values())
    assert sample.keys() == {"de-BT", "de-DENOISE", "en-BT", "en-DENOISE"}
    assert run.losses[update] == pytest.approx(expected, rel=1e-5)


def test_a_run_resumes_with_its_added_language_tokens(data, tmp_path):
    whole = fit(data, tmp_path / "whole", *FLAGS, updates=4)
    fit(data, tmp_path / "parts", *FLAGS, updates=2)
    resumed = fit(data, tmp_path / "parts", *FLAGS, updates=4)
    assert resumed.losses == whole.losses[2:]


def rank(data: Path, save_dir: Path, meeting: str, *flags: str):
    """The losses of one of two ranks, or its error."""
    from fairseq_sparsemixer.cli.launch import rank_command

    launched = rank_command(["fairseq-train"], rank_number(), 2, meeting)[1:]
    try:
        return fit(data, save_dir, *FLAGS, *launched, *flags, updates=2).losses
    except SystemExit as end:
        return str(end)


@pytest.mark.distributed
def test_two_ranks_with_all_experts_have_equal_losses(data, tmp_path):
    first, second = run_ranks(2, rank, data, tmp_path, meeting_place(), "--expert-parallel-size", "1", group=False)
    assert len(first) == 2 and first == second


@pytest.mark.distributed
def test_two_ranks_that_share_the_experts_train_as_two_with_all_experts(data, tmp_path):
    whole, _ = run_ranks(2, rank, data, tmp_path / "a", meeting_place(), "--expert-parallel-size", "1", group=False)
    shared = run_ranks(2, rank, data, tmp_path / "b", meeting_place(), group=False)
    assert len(whole) == 2 and shared[0] == shared[1] == pytest.approx(whole, rel=1e-5)


@pytest.mark.distributed
def test_ranks_that_share_a_balance_loss_translate_alone(data, tmp_path):
    flags = ["--expert-parallel-size", "1", "--balance-scope", "global"]
    first, second = run_ranks(2, rank, data, tmp_path, meeting_place(), *flags, group=False)
    assert len(first) == 2 and first == second


def test_a_balance_loss_over_an_update_is_refused(data, tmp_path):
    with pytest.raises(SystemExit, match="the task generates in training, which --balance-scope update would do twice"):
        fit(data, tmp_path, *FLAGS, "--balance-scope", "update", "--update-freq", 2, updates=1)
