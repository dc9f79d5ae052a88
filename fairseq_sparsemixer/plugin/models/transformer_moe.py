"""`transformer_moe`: fairseq's encoder-decoder transformer with experts in chosen layers of both stacks."""

import copy
from dataclasses import dataclass, field
from typing import Any, Type

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.distributed import fsdp_wrap
from fairseq.models import register_model
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoder,
    TransformerDecoderBase,
    TransformerEncoder,
    TransformerEncoderBase,
    TransformerModel,
    transformer_legacy,
)
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.models.architectures import fill_defaults, register_architecture
from fairseq_sparsemixer.plugin.models.config import check_options, layers_to_keep
from fairseq_sparsemixer.plugin.models.fast_path import DenseEncoderLayer
from fairseq_sparsemixer.plugin.models.hydra import check_option_names
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS, given
from fairseq_sparsemixer.plugin.models.loading import ChecksCheckpoints
from fairseq_sparsemixer.plugin.models.moe_block import (
    ChoosesLayers,
    MoEDecoderLayer,
    MoEEncoderLayer,
    RemembersUpdates,
    hand_down_token_ids,
    name_dropout,
)


@dataclass
class TransformerMoEConfig(MoEOptions, TransformerConfig):
    """fairseq's TransformerConfig with the options of the experts."""

    moe_encoder_only: bool = field(default=False, metadata={"help": "no experts in the decoder (transformer_moe only)"})


def wrap_for_fsdp(cfg: Any, layer: nn.Module) -> nn.Module:
    """As in fairseq: wrap a checkpointed layer always, any other layer if it is large enough."""
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


def as_class(module: nn.Module, base: Type[nn.Module]) -> nn.Module:
    """The same module as an instance of `base`, without our methods: TorchScript cannot compile super().

    If there are experts, MoELayer refuses.
    """
    plain = copy.copy(module)
    plain.__class__ = base
    return plain


class MoEEncoder(ChoosesLayers, TransformerEncoderBase):
    """fairseq's encoder; chosen layers have experts."""

    stack = "encoder"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        name_dropout(self, TransformerEncoder.__name__)

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        own = self.next_layer_config(cfg)
        if own is not None:
            return wrap_for_fsdp(cfg, MoEEncoderLayer(own, return_fc=self.return_fc))
        layer = DenseEncoderLayer(cfg, return_fc=self.return_fc)
        if cfg.checkpoint_activations:
            layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        return wrap_for_fsdp(cfg, layer)

    def forward_embedding(self, src_tokens: Tensor, *args, **kwargs):
        """See TransformerEncoderBase; overridden because token ids are known here."""
        hand_down_token_ids(self.layers, src_tokens)
        return super().forward_embedding(src_tokens, *args, **kwargs)

    def __prepare_scriptable__(self) -> TransformerEncoderBase:
        return as_class(self, TransformerEncoderBase)


class MoEDecoder(ChoosesLayers, TransformerDecoderBase):
    """fairseq's decoder; chosen layers have experts."""

    stack = "decoder"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        name_dropout(self, TransformerDecoder.__name__)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        own = self.next_layer_config(cfg)
        if own is None:
            return super().build_decoder_layer(cfg, no_encoder_attn)
        return wrap_for_fsdp(cfg, MoEDecoderLayer(own, no_encoder_attn))

    def extract_features(self, prev_output_tokens: Tensor, encoder_out: Any = None, incremental_state: Any = None, **kwargs):
        """See TransformerDecoderBase; in incremental decoding, the layers see only the last token."""
        hand_down_token_ids(self.layers, prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:])
        return super().extract_features(prev_output_tokens, encoder_out, incremental_state, **kwargs)

    def __prepare_scriptable__(self) -> TransformerDecoderBase:
        return as_class(self, TransformerDecoderBase)


@register_model("transformer_moe")
class TransformerMoEModel(ChecksCheckpoints, RemembersUpdates, TransformerModel):
    """fairseq's transformer with experts; with `--router dense`, the plain transformer."""

    @classmethod
    def add_args(cls, parser) -> None:
        """One flag per field of TransformerMoEConfig; the architectures below set the defaults."""
        gen_parser_from_dataclass(parser, TransformerMoEConfig(), delete_default=True, with_prefix="")

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "TransformerMoEModel":
        """See TransformerModel. Raises ConfigurationError for invalid options."""
        check_option_names(args, cls, base)
        cfg = TransformerMoEConfig.from_namespace(args)
        check_options(cfg, {stack: getattr(cfg, stack).layers for stack in STACKS})
        for stack in STACKS:  # fairseq expects a string here, but makes a list of the flag
            getattr(cfg, stack).layers_to_keep = ",".join(map(str, layers_to_keep(cfg, stack))) or None
        if cfg is not args:  # a checkpoint saves args
            args.encoder_moe_layers, args.decoder_moe_layers = (given(cfg, stack) for stack in STACKS)
        return super().build_model(cfg, task)

    @classmethod
    def build_encoder(cls, cfg: Any, src_dict: Any, embed_tokens: nn.Module) -> MoEEncoder:
        return MoEEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg: Any, tgt_dict: Any, embed_tokens: nn.Module) -> MoEDecoder:
        return MoEDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


@register_architecture("transformer_moe", "transformer_moe", "transformer_moe_base")
def base(args: Any) -> None:
    """The paper's translation model: Transformer-base, experts in every second layer."""
    fill_defaults(args, MoEOptions)
    transformer_legacy.base_architecture(args)


@register_architecture("transformer_moe", "transformer_moe_glam")
def glam(args: Any) -> None:
    """The base transformer with GLaM's choices (arXiv 2112.06905): two GEGLU experts per token in every other layer."""
    preset = {"router": "gshard", "moe_freq": 2, "expert_activation": "geglu"}
    for name, value in preset.items():
        setattr(args, name, getattr(args, name, value))
    base(args)


@register_architecture("transformer_moe", "transformer_moe_tiny")
def tiny(args: Any) -> None:
    """fairseq's transformer_tiny with experts; for tests."""
    fill_defaults(args, MoEOptions)
    transformer_legacy.tiny_architecture(args)


@register_architecture("transformer_moe", "transformer_moe_iwslt")
def iwslt(args: Any) -> None:
    """fairseq's transformer_iwslt_de_en with experts."""
    fill_defaults(args, MoEOptions)
    transformer_legacy.transformer_iwslt_de_en(args)


@register_architecture("transformer_moe", "transformer_moe_big")
def big(args: Any) -> None:
    """fairseq's transformer_vaswani_wmt_en_de_big with experts."""
    fill_defaults(args, MoEOptions)
    transformer_legacy.transformer_vaswani_wmt_en_de_big(args)
