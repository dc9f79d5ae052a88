"""fairseq's monolingual tasks: their batches and logged losses for models with experts."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from fairseq import options
from fitting import EXPERTS, LAYER, TRANSLATION, bits, fit, weights
from runs import initialised
from texts import draw_sentences, write_dictionary, write_sentences
from torch.nn.functional import log_softmax

pytestmark = pytest.mark.slow

ENCODER = (LAYER.format("encoder") + " --max-positions 64").split()


def check_resumption(data: Path, folder: Path, run, updates: int, *flags) -> None:
    """Assert that a run in two parts, in `folder`, has the same losses and weights as `run`."""
    first = fit(data, folder, *flags, updates=updates // 2)
    second = fit(data, folder, *flags, updates=updates)
    assert first.losses + second.losses == run.losses
    expected, found = (weights(path / "checkpoint_last.pt") for path in (save_dir(run), folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def save_dir(run) -> Path:
    return Path(run.trainer.cfg.checkpoint.save_dir)


def test_denoising_trains_on_masked_text_with_the_original_as_target(pairs, tmp_path):
    try:
        options.parse_args_and_arch(options.get_training_parser(), [str(pairs), "--task", "denoising", "--arch", "bart_base"])
    except argparse.ArgumentError as error:
        pytest.skip(f"in this fairseq, the denoising task fails for its own models as well: {error}")
    flags = (
        *"--task denoising --tokens-per-sample 16 --sample-break-mode eos --mask 0.4 --replace-length 1 --rotate 0".split(),
        *"--batch-size 8 --no-epoch-checkpoints --disable-validation".split(), *TRANSLATION, *EXPERTS,
        *"--data-buffer-size 0".split(),  # otherwise a thread reads ahead, and draws noise at any time
    )  # fmt: skip
    run = fit(pairs, tmp_path / "whole", *flags, updates=6)
    task = run.trainer.task
    for update, (sample,) in enumerate(run.batches):
        source, target = sample["net_input"]["src_tokens"], sample["target"]
        masked = source.eq(task.mask_idx)
        real = target.ne(task.dictionary.pad())
        assert masked.sum(1).tolist() == [math.ceil(0.4 * (length - 2)) for length in real.sum(1).tolist()]  # <s> and </s>
        assert torch.equal(source[~masked], target[~masked]) and target.ne(task.mask_idx).all()
        assert run.losses[update] == pytest.approx(bits(run.models[update], sample, task.dictionary.pad()), rel=1e-5)
    # its masks depend on torch's random state, which fairseq does not save, so only the weights can be compared
    fit(pairs, tmp_path / "parts", *flags, updates=3)
    resumed = fit(pairs, tmp_path / "parts", *flags, updates=4).models[0].state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in initialised(run.models[3].state_dict()).items())


def test_the_masked_lm_loss_uses_only_masked_words(pairs, tmp_path):
    flags = (
        *"--task masked_lm --tokens-per-sample 16 --sample-break-mode eos --mask-prob 0.3 --batch-size 8".split(),
        *"--criterion moe_masked_lm --arch roberta_moe_tiny --no-epoch-checkpoints --disable-validation".split(),
        *ENCODER, *EXPERTS,
    )  # fmt: skip
    run = fit(pairs, tmp_path / "whole", *flags, updates=6)
    task = run.trainer.task
    for update, (sample,) in enumerate(run.batches):
        chosen = sample["target"].ne(task.dictionary.pad())
        assert 0 < chosen.sum() < sample["net_input"]["src_tokens"].ne(task.dictionary.pad()).sum() / 2
        assert run.losses[update] == pytest.approx(bits(run.models[update], sample, task.dictionary.pad()), rel=1e-5)
    check_resumption(pairs, tmp_path / "parts", run, 6, *flags)


def test_a_language_models_perplexity_equals_that_of_its_text(pairs, trained, path_of, run_fairseq):
    run = trained["target"]
    for update, (sample,) in enumerate(run.batches):
        assert run.losses[update] == pytest.approx(bits(run.models[update], sample, 1), rel=1e-5)
    found = run_fairseq(
        "eval_lm", pairs, "--user-dir", Path(__file__).resolve().parents[2] / "fairseq_sparsemixer", "--gen-subset", "valid",
        "--cpu", "--path", path_of("target"), "--tokens-per-sample", 32, "--sample-break-mode", "eos", "--batch-size", 8,
        "--required-batch-size-multiple", 1,
    )  # fmt: skip
    task, total, count = run.trainer.task, 0.0, 0
    task.load_dataset("valid")
    for index in range(len(task.dataset("valid"))):  # one by one, because batching must not change the result
        sample = task.dataset("valid").collater([task.dataset("valid")[index]])
        total += bits(run.models[-1], sample, 1) * sample["target"].numel()
        count += sample["target"].numel()
    assert float(found["loss"]) == pytest.approx(total / count, rel=1e-5)
    assert float(found["perplexity"]) == pytest.approx(2 ** (total / count), rel=1e-4)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Sentences labelled by the half of the dictionary that contains their first word."""
    folder = tmp_path_factory.mktemp("labelled")
    words = write_dictionary(folder / "input0" / "dict.txt")
    labels = type(words)()
    for label in ("0", "1"):
        labels.add_symbol(label)
    (folder / "label").mkdir()
    labels.save(str(folder / "label" / "dict.txt"))
    for part, count in (("train", 48), ("valid", 24)):
        sentences = draw_sentences(count, seed=len(part))
        write_sentences(folder / "input0" / part, sentences, words)
        write_sentences(folder / "label" / part, [[str(int(int(line[0][1:]) >= 10))] for line in sentences], labels)
    return folder


def test_sentence_prediction_reports_loss_and_accuracy(labelled, tmp_path):
    flags = (
        *"--task sentence_prediction --num-classes 2 --init-token 0 --separator-token 2 --batch-size 8".split(),
        *"--criterion moe_sentence_prediction --arch roberta_moe_tiny --no-epoch-checkpoints --pooler-dropout 0".split(),
        *ENCODER, *EXPERTS,
    )  # fmt: skip
    run = fit(labelled, tmp_path / "whole", *flags, updates=12)

    def classify(model, sample):
        model = model.double().eval()
        with torch.no_grad():
            return model(sample["net_input"]["src_tokens"], classification_head_name="sentence_classification_head")[0]

    for update, (sample,) in enumerate(run.batches):
        logits = classify(run.models[update], sample)
        chosen = log_softmax(logits, -1).gather(1, sample["target"].view(-1, 1))
        assert run.losses[update] == pytest.approx(-chosen.mean().item() / math.log(2), rel=1e-5)
    dataset, right = run.trainer.task.dataset("valid"), 0
    for index in range(len(dataset)):
        sample = dataset.collater([dataset[index]])
        right += int(classify(run.models[-1], sample).argmax() == sample["target"].item())
    assert run.valid[-1]["accuracy"] == pytest.approx(100 * right / len(dataset), abs=0.06)
