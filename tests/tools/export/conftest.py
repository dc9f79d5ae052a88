"""Tiny checkpoints to export, and the classes of transformers that they are compared with."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEModel, tiny

PRE_NORM = {"encoder_normalize_before": True, "decoder_normalize_before": True}


@pytest.fixture(scope="session")
def transformers():
    """The package, or a skipped test."""
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def nllb_moe(transformers):
    """Its class NllbMoeForConditionalGeneration."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("NllbMoe of transformers 5 sends all tokens to its first two experts; use transformers 4")
    return transformers.NllbMoeForConditionalGeneration


@pytest.fixture
def save(tmp_path):
    """save(args, model, task settings) -> the path of a checkpoint whose biases and routers are not at their initial values."""

    def write(args, model, **task):
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".projection." in name:
                nn.init.normal_(parameter, std=0.3)
        state = {"args": None, "cfg": {"model": args, "task": {"_name": "translation", **task}}, "model": model.state_dict()}
        torch.save(state, tmp_path / "m.pt")
        return tmp_path / "m.pt"

    return write


@pytest.fixture
def translation_checkpoint(save, translation_task):
    """translation_checkpoint(**flags) -> (model, path) of a pre-norm transformer_moe with 4 layers per stack and 4 experts."""

    def build(task=translation_task, **flags):
        stacks = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in SIZES.items()}
        given = {**stacks, **PRE_NORM, "share_all_embeddings": True, "num_experts": 4, "router": "gshard", **flags}
        args = argparse.Namespace(arch="transformer_moe_tiny", _name="transformer_moe_tiny", **given)
        tiny(args)
        model = TransformerMoEModel.build_model(args, task).eval()
        return model, save(args, model)

    return build


SIZES = {"layers": 4, "embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2}


@pytest.fixture
def exported(tmp_path):
    """exported(checkpoint, *flags) -> the folder that the command wrote."""

    def run(path, *flags):
        assert main(["export-hf", str(path), str(tmp_path / "hf"), *map(str, flags)]) == 0
        return tmp_path / "hf"

    return run


@pytest.fixture
def words_task(masked_lm_task):
    """What the models of one dictionary need of a task."""
    words = masked_lm_task.dictionary
    return SimpleNamespace(
        source_dictionary=words, target_dictionary=words, dictionary=words, max_positions=lambda: 32, cfg=masked_lm_task.cfg
    )
