"""`transformer_lm_moe`: fairseq's decoder-only language model with experts in chosen layers."""

from dataclasses import dataclass
from typing import Any

from fairseq.models import register_model, transformer_lm
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.models.architectures import register_architecture
from fairseq_sparsemixer.plugin.models.config import check_options
from fairseq_sparsemixer.plugin.models.loading import ChecksCheckpoints
from fairseq_sparsemixer.plugin.models.moe_block import RemembersUpdates
from fairseq_sparsemixer.plugin.models.transformer_moe import MoEDecoder, TransformerMoEConfig


@dataclass
class TransformerLanguageModelMoEConfig(MoEOptions, TransformerLanguageModelConfig):
    """fairseq's TransformerLanguageModelConfig with the options of the experts."""


@register_model("transformer_lm_moe", dataclass=TransformerLanguageModelMoEConfig)
class TransformerLanguageModelMoE(ChecksCheckpoints, RemembersUpdates, TransformerLanguageModel):
    """fairseq's language model with experts; with `--router dense`, the plain model."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "TransformerLanguageModelMoE":
        """See TransformerLanguageModel. Raises ConfigurationError for invalid options."""
        check_options(args, {"decoder": args.decoder_layers})
        dense = super().build_model(args, task)  # hard-codes its decoder class; only the embeddings are reused
        if args.router == DENSE:
            return dense
        cfg = TransformerMoEConfig.from_namespace(args)
        return cls(MoEDecoder(cfg, task.target_dictionary, dense.decoder.embed_tokens, no_encoder_attn=True))


@register_architecture("transformer_lm_moe", "transformer_lm_moe_base")
def base(args: Any) -> None:
    """fairseq's transformer_lm architecture with experts: 6 layers of width 512, each normalising its inputs."""
    transformer_lm.base_lm_architecture(args)


@register_architecture("transformer_lm_moe", "transformer_lm_moe_tiny")
def tiny(args: Any) -> None:
    """fairseq's transformer_lm_gpt2_tiny with experts; for tests."""
    transformer_lm.transformer_lm_gpt2_tiny(args)


@register_architecture("transformer_lm_moe", "transformer_lm_moe_gpt")
def gpt(args: Any) -> None:
    """fairseq's transformer_lm_gpt with experts: 12 layers, width 768, the size of GPT and of GPT-2's smallest."""
    transformer_lm.transformer_lm_gpt(args)


@register_architecture("transformer_lm_moe", "transformer_lm_moe_gpt2_small")
def gpt2_small(args: Any) -> None:
    """fairseq's transformer_lm_gpt2_small with experts: 24 layers, width 1024."""
    transformer_lm.transformer_lm_gpt2_small(args)


@register_architecture("transformer_lm_moe", "transformer_lm_moe_gpt2_medium")
def gpt2_medium(args: Any) -> None:
    """fairseq's transformer_lm_gpt2_medium with experts: 36 layers, width 1280."""
    transformer_lm.transformer_lm_gpt2_medium(args)


@register_architecture("transformer_lm_moe", "transformer_lm_moe_wiki103")
def wiki103(args: Any) -> None:
    """fairseq's transformer_lm_wiki103 with experts: adaptive softmax, tied adaptive inputs (arXiv 1809.10853)."""
    transformer_lm.transformer_lm_baevski_wiki103(args)
