"""Validation in training: BLEU of generated translations, and early stopping."""

from pathlib import Path

import pytest
from decoding import decode
from fitting import EXPERTS, TRANSLATION, fit, weights
from ranks import meeting_place, rank_number, run_ranks
from texts import draw_sentences, write_dictionary, write_sentences

pytestmark = pytest.mark.slow

FLAGS = [*TRANSLATION, *EXPERTS, "--batch-size", 8, "--no-epoch-checkpoints"]
BLEU = ["--eval-bleu", "--eval-bleu-args", '{"beam": 3, "max_len_a": 0, "max_len_b": 8}', "--best-checkpoint-metric", "bleu"]
BLEU += ["--maximize-best-checkpoint-metric"]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """(data, references of `valid`) of a copy task with a few sentences, which a small model learns in part.

    One epoch has 50 updates, because fairseq changes the batches of a run that resumes in a later epoch.
    """
    folder = tmp_path_factory.mktemp("copied")
    references = draw_sentences(4, seed=7, shortest=5, longest=7) * 4
    for language in ("de", "en"):
        words = write_dictionary(folder / f"dict.{language}.txt")
        write_sentences(folder / f"train.de-en.{language}", references * 25, words)
        write_sentences(folder / f"valid.de-en.{language}", references, words)
    return folder, [" ".join(line) for line in references]


@pytest.mark.parametrize("tokenized", [False, True], ids=["13a", "tokenized"])
def test_bleu_in_training_equals_that_of_generation_and_the_run_resumes(tokenized, copied, tmp_path):
    import sacrebleu

    data, references = copied
    flags = [*FLAGS, *BLEU, *(["--eval-tokenized-bleu"] if tokenized else [])]
    run = fit(data, tmp_path / "whole", *flags, updates=40)
    path = tmp_path / "whole" / "checkpoint_last.pt"
    hypotheses = [one.text for one in decode(data, path, tmp_path, "--beam", 3)]
    expected = sacrebleu.corpus_bleu(hypotheses, [references], **({"tokenize": "none"} if tokenized else {})).score
    assert 1 < expected < 100 and run.valid[-1]["bleu"] == pytest.approx(expected, abs=0.01)
    assert run.trainer.cfg.checkpoint.best_checkpoint_metric == "bleu"

    fit(data, tmp_path / "parts", *flags, updates=38)
    resumed = fit(data, tmp_path / "parts", *flags, updates=40)
    assert resumed.losses == run.losses[38:] and resumed.valid[-1]["bleu"] == run.valid[-1]["bleu"]
    first, second = weights(path), weights(tmp_path / "parts" / "checkpoint_last.pt")
    assert all(first[name].equal(second[name]) for name in first)


def score_on_a_rank(data: Path, checkpoint: Path, save_dir: Path, meeting: str):
    """The validation figures of one of two ranks that start from the checkpoint and change it by next to nothing."""
    from fairseq_sparsemixer.cli.launch import rank_command

    launched = rank_command(["fairseq-train"], rank_number(), 2, meeting)[1:]
    start = ["--finetune-from-model", checkpoint, "--lr", 1e-30, "--batch-size-valid", 3]
    return fit(data, save_dir, *FLAGS, *BLEU, *start, *launched, updates=1).valid[-1]


@pytest.mark.distributed
@pytest.mark.parametrize("sentences", [16, 7], ids=["as many batches", "one rank without a last batch"])
def test_two_ranks_that_share_the_experts_score_as_one_process(sentences, copied, tmp_path):
    import sacrebleu

    folder, references = copied
    data = tmp_path / "data"
    data.mkdir()
    draw = draw_sentences(sentences, seed=3, shortest=1, longest=8)  # translations of different lengths
    for language in ("de", "en"):
        words = write_dictionary(data / f"dict.{language}.txt")
        for part, lines in (("train", draw), ("valid", draw)):
            write_sentences(data / f"{part}.de-en.{language}", lines, words)
    fit(folder, tmp_path / "trained", *FLAGS, "--disable-validation", updates=40)
    path = tmp_path / "trained" / "checkpoint_last.pt"
    hypotheses = [one.text for one in decode(data, path, tmp_path, "--beam", 3)]
    expected = sacrebleu.corpus_bleu(hypotheses, [[" ".join(line) for line in draw]])
    assert len({len(text.split()) for text in hypotheses}) > 1 and expected.counts[0] > 0
    ranks = run_ranks(2, score_on_a_rank, data, path, tmp_path / "run", meeting_place(), group=False)
    for figures in ranks:
        assert figures["bleu"] == pytest.approx(expected.score, abs=0.01)


def test_patience_stops_a_run_that_does_not_improve(pairs, tmp_path):
    run = fit(pairs, tmp_path, *FLAGS, "--lr", 1e-30, "--patience", 2, updates=100)
    assert len(run.valid) == 3, "the first validation is the best, and two more are no better"
    assert len(run.losses) == 3 * 48 // 8
