"""Our model built from the arguments of a converted checkpoint, without memory for its weights."""

import argparse
import copy
import re
from types import SimpleNamespace
from typing import Dict

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.models.transformer_lm_moe import TransformerLanguageModelMoE, TransformerLanguageModelMoEConfig
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEModel

BUFFER = re.compile(r".*\.(version|_float_tensor|embed_positions\.weights)")  # saved beside parameters by some fairseq versions


def build_skeleton(model: argparse.Namespace, weights: Dict[str, Tensor]) -> nn.Module:
    """A model on the meta device, for the names, shapes and order of its tensors.

    Raises ConfigurationError for invalid arguments and missing embeddings.
    """
    args = copy.deepcopy(model)
    args.encoder_embed_path = args.decoder_embed_path = None  # files on the machine it was trained on
    with torch.device("meta"):
        if model.arch == "transformer_lm_moe":
            words = _dictionary(weights, "decoder")
            task = SimpleNamespace(source_dictionary=words, target_dictionary=words)
            return TransformerLanguageModelMoE.build_model(TransformerLanguageModelMoEConfig.from_namespace(args), task)
        source = _dictionary(weights, "encoder")
        target = source if getattr(args, "share_all_embeddings", False) else _dictionary(weights, "decoder")
        return TransformerMoEModel.build_model(args, SimpleNamespace(source_dictionary=source, target_dictionary=target))


def _dictionary(weights: Dict[str, Tensor], stack: str) -> Dictionary:
    """A dictionary with as many words as the stack's embeddings have rows."""
    name = f"{stack}.embed_tokens.weight"
    if name not in weights:
        raise ConfigurationError(f"the checkpoint has no {name}; it is not a complete model")
    words = Dictionary()
    for index in range(weights[name].size(0) - len(words)):
        words.add_symbol(str(index))
    return words
