"""What the tests share: the repository's root, the real text where there is some, and a tiny translation task."""

import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)  # for subprocesses


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with multi30k/ and wikitext2/, from the environment variable SPARSEMIXER_DATA or beside the repository."""
    path = Path(os.environ.get("SPARSEMIXER_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real text at {path}; set SPARSEMIXER_DATA to a folder with multi30k/ and wikitext2/")
    return path


@pytest.fixture(scope="session")
def dictionary():
    """A fairseq Dictionary of 20 words: w0 to w19."""
    from fairseq.data import Dictionary

    words = Dictionary()
    for index in range(20):
        words.add_symbol(f"w{index}")
    return words


@pytest.fixture(scope="session")
def translation_task(dictionary):
    """fairseq's translation task between two copies of the dictionary, without data."""
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    return TranslationTask(TranslationConfig(), dictionary, dictionary)


@pytest.fixture
def build_translation_model(translation_task):
    """build(**flags) -> a transformer_moe model of two layers a stack and width 16; flags as attributes, e.g. router="switch"."""
    from fairseq_sparsemixer.models.transformer_moe import TransformerMoEModel, tiny

    def build(**flags):
        small = dict(
            encoder_layers=2, decoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2
        )
        args = Namespace(**{**small, "num_experts": 4, "dropout": 0.0, **flags})
        args.decoder_embed_dim, args.decoder_ffn_embed_dim = args.encoder_embed_dim, args.encoder_ffn_embed_dim
        args.decoder_attention_heads = args.encoder_attention_heads
        tiny(args)
        return TransformerMoEModel.build_model(args, translation_task)

    return build


@pytest.fixture
def translation_batch(dictionary):
    """batch(lengths) -> a sample as fairseq's translation task collates it, sentences of the given lengths, random words."""
    from fairseq.data.language_pair_dataset import collate

    def batch(*lengths: int):
        def sentence(length: int):
            words = torch.randint(dictionary.nspecial, len(dictionary), (length,))
            return torch.cat([words, words.new_tensor([dictionary.eos()])])

        samples = [{"id": i, "source": sentence(n), "target": sentence(n)} for i, n in enumerate(lengths)]
        return collate(samples, dictionary.pad(), dictionary.eos(), input_feeding=True)

    return batch
