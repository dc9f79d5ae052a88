"""Validation in training: BLEU of generated translations, and early stopping."""

import pytest
from decoding import decode
from fitting import EXPERTS, TRANSLATION, fit, weights
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


def test_patience_stops_a_run_that_does_not_improve(pairs, tmp_path):
    run = fit(pairs, tmp_path, *FLAGS, "--lr", 1e-30, "--patience", 2, updates=100)
    assert len(run.valid) == 3, "the first validation is the best, and two more are no better"
    assert len(run.losses) == 3 * 48 // 8
