"""A tiny checkpoint for commands that read one."""

from argparse import Namespace

import pytest
import torch

from fairseq_sparsemixer.plugin.models.transformer_moe import tiny


@pytest.fixture
def trained(tmp_path, build_translation_model, translation_task):
    """(flags, checkpoint): a checkpoint saved by fairseq, next to its dictionaries and a sentence pair."""
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_text("w1 w2 w3\n")
    for language in ("en", "de"):
        translation_task.source_dictionary.save(str(tmp_path / f"dict.{language}.txt"))
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2)
    args = Namespace(arch="transformer_moe_tiny", task="translation", criterion="moe_cross_entropy", num_experts=4, **sizes)
    args.decoder_embed_dim, args.decoder_ffn_embed_dim, args.decoder_attention_heads = 16, 32, 2
    args.data, args.source_lang, args.target_lang = str(tmp_path), "en", "de"
    tiny(args)
    state = {
        "args": args,
        "model": build_translation_model().state_dict(),
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 3}],
        "extra_state": {"train_iterator": {"epoch": 1}},
        "task_state": {},
    }
    torch.save(state, tmp_path / "m.pt")
    flags = ["--checkpoint", str(tmp_path / "m.pt"), "--text", str(tmp_path / "a.en"), "--target", str(tmp_path / "a.de")]
    return flags, tmp_path / "m.pt"
