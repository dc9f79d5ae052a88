"""Shared data and models for the tests of decoding and of averaged weights; each model is trained once."""

from pathlib import Path
from typing import Dict

import pytest
from fitting import EXPERTS, LAYER, TRANSLATION, Run, fit
from texts import draw_sentences, write_dictionary, write_sentences


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """48 + 8 German-English pairs of random words, and the English side as monolingual text, with one dictionary."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("dict.de.txt", "dict.en.txt", "dict.txt"):
        dictionary = write_dictionary(folder / name)
    for part, count in (("train", 48), ("valid", 8)):
        for seed, language in enumerate(("de", "en")):
            write_sentences(folder / f"{part}.de-en.{language}", draw_sentences(count, seed), dictionary)
        write_sentences(folder / part, draw_sentences(count, seed), dictionary)
    return folder


@pytest.fixture(scope="session")
def trained(pairs, tmp_path_factory) -> Dict[str, Run]:
    """Runs by name; path_of gives their last checkpoints. `target` is a language model."""
    flags = {
        "switch": [*TRANSLATION, *EXPERTS],
        "sparsemixer": [*TRANSLATION, *EXPERTS, "--router", "sparsemixer", "--jitter-eps", 0.1],
        "dense": [*TRANSLATION, *EXPERTS, "--router", "dense", "--criterion", "cross_entropy"],
        "target": (
            f"--task language_modeling --arch transformer_lm_moe_tiny {LAYER.format('decoder')} --tokens-per-sample 32"
            " --share-decoder-input-output-embed --sample-break-mode eos --criterion moe_cross_entropy"
        ).split() + EXPERTS,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("trained")
    return {
        name: fit(pairs, folder / name, "--batch-size", 8, "--disable-validation", "--no-epoch-checkpoints", *words, updates=12)
        for name, words in flags.items()
    }


@pytest.fixture(scope="session")
def path_of(trained):
    """path_of(name) -> the run's last checkpoint."""
    return lambda name: Path(trained[name].trainer.cfg.checkpoint.save_dir) / "checkpoint_last.pt"
