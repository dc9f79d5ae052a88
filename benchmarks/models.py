"""Translation models with random weights, and batches for them, for benchmarks of whole models."""

from argparse import Namespace
from typing import Any, Dict

import torch
from fairseq.data import Dictionary
from fairseq.data.language_pair_dataset import collate
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_sparsemixer.plugin.models import transformer_moe

ARCHITECTURES = {"tiny": transformer_moe.tiny, "iwslt": transformer_moe.iwslt, "base": transformer_moe.base}


def translation_task(words: int) -> TranslationTask:
    """fairseq's translation task with one dictionary of `words` words, without data."""
    dictionary = Dictionary()
    for index in range(words):
        dictionary.add_symbol(f"w{index}")
    return TranslationTask(TranslationConfig(), dictionary, dictionary)


def build_model(task: TranslationTask, architecture: str, router: str, experts: int) -> torch.nn.Module:
    """transformer_moe; router "dense" is the plain transformer, with the same active FLOPs as one expert per token."""
    args = Namespace(router=router, num_experts=experts)
    ARCHITECTURES[architecture](args)
    return transformer_moe.TransformerMoEModel.build_model(args, task)


def random_batch(task: TranslationTask, sentences: int, length: int) -> Dict[str, Any]:
    """A sample as collated by fairseq's translation task: sentences of the given length, random words."""
    dictionary = task.source_dictionary

    def sentence() -> torch.Tensor:
        words = torch.randint(dictionary.nspecial, len(dictionary), (length - 1,))
        return torch.cat([words, words.new_tensor([dictionary.eos()])])

    samples = [{"id": i, "source": sentence(), "target": sentence()} for i in range(sentences)]
    return collate(samples, dictionary.pad(), dictionary.eos(), input_feeding=True)
