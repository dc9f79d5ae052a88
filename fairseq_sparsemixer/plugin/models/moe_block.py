"""fairseq's transformer layers with the feed-forward network replaced by an MoE layer.

A layer's feed-forward network is fc2(dropout(activation(fc1(x)))): fc1 becomes the MoE layer, which does all of it, and the
others become identities. Attention, residuals, normalisation and incremental decoding remain fairseq's own code.
"""

from contextlib import nullcontext
from typing import Any, Callable, Iterable, Optional, Type

import torch
from fairseq import utils
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.cmr import ConditionalRouting
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.layer import MoELayer, build_moe_layer
from fairseq_sparsemixer.plugin.models.config import layers_to_keep
from fairseq_sparsemixer.plugin.models.fast_path import NoFastPath
from fairseq_sparsemixer.plugin.models.layer_choice import UNKNOWN, experts_in_layer, with_experts
from fairseq_sparsemixer.plugin.models.router_options import router_options


def _identity(x: Tensor) -> Tensor:
    return x


def expert_dropout(cfg: Any) -> float:
    """The dropout inside an expert: --expert-dropout, or that of fairseq's feed-forward layers."""
    return dense_dropout(cfg) if cfg.expert_dropout is None else cfg.expert_dropout


def dense_dropout(cfg: Any) -> float:
    """The dropout inside fairseq's feed-forward layers."""
    return float(cfg.activation_dropout or cfg.relu_dropout or 0)


def dense_activation(cfg: Any) -> Callable[[Tensor], Tensor]:
    """The activation of fairseq's feed-forward layers."""
    return utils.get_activation_fn(str(cfg.activation_fn))


def conditional_routing(cfg: Any, model_dim: int, hidden_dim: int) -> Optional[ConditionalRouting]:
    """--moe-cmr's shared network, which is what fairseq's feed-forward layer is, and its gate; None without the flag."""
    if not cfg.moe_cmr:
        return None
    return ConditionalRouting(model_dim, hidden_dim, dense_activation(cfg), dense_dropout(cfg), cfg.moe_cmr_gate_dropout)


def name_dropout(module: nn.Module, name: str) -> None:
    """Name the module's own dropout as in fairseq's model, for --retain-dropout-modules."""
    for dropout in module.children():
        if isinstance(dropout, FairseqDropout):
            dropout.module_name = name


class _NoWeights:
    """Mixin for the replacements of fc1 and fc2: fairseq 0.12.2's encoder layer reads their weights' shapes (see fast_path)."""

    weight = bias = torch.empty(0)


class _NoLayer(_NoWeights, nn.Identity):
    """Replaces fc2."""


class _FeedForward(_NoWeights, nn.Module):
    """The MoE layer as fc1 of fairseq's layer, which passes only x. The padding mask and token ids are set beforehand."""

    moe: MoELayer

    def __init__(self, moe: MoELayer):
        super().__init__()
        self.moe = moe
        self.padding_mask: Optional[Tensor] = None  # [T, B]
        self.token_ids: Optional[Tensor] = None  # [T, B]; see hand_down_token_ids
        self.dropout_name: Optional[str] = None  # for --retain-dropout-modules

    def forward(self, x: Tensor) -> Tensor:
        if self.token_ids is None:
            return self.moe(x, self.padding_mask)
        return self.moe(x, self.padding_mask, self.token_ids)

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script calls this on each module, outermost first
        raise ConfigurationError(
            "torch.jit.script cannot compile a model with experts, whose control flow depends on data; use the model unscripted,"
            " or --router dense"
        )

    def make_generation_fast_(self, name: str, **kwargs) -> None:
        """Called by fairseq before generation: with --retain-dropout, experts keep dropout if a dense layer would."""
        dropout = FairseqDropout(self.moe.experts.dropout, self.dropout_name)
        dropout.make_generation_fast_(name, **kwargs)
        for experts in (self.moe.experts, self.moe.shared_experts, self.moe.cmr and self.moe.cmr.shared):
            if experts is not None:
                experts.drop_at_inference = dropout.apply_during_inference


def hand_down_token_ids(layers: Iterable[nn.Module], token_ids: Tensor) -> None:
    """Pass the ids [B, T] of the next tokens to those layers of a stack whose gate, or follower, wants them."""
    for layer in layers:
        feed_forward = getattr(layer, "fc1", None)
        if isinstance(feed_forward, _FeedForward) and feed_forward.moe.wants_token_ids:
            feed_forward.token_ids = token_ids.t()


class _MoEBlock:
    """Shared by both kinds of layer: the hooks that build the feed-forward network, and passing the padding mask."""

    fc1: _FeedForward
    moe_cfg: Any
    training: bool

    def _prepare(self, cfg: Any) -> None:
        # a plain attribute, set before fairseq's constructor calls the build hooks; a decoder layer keeps no cfg itself
        self.__dict__["moe_cfg"] = cfg

    def _finish(self, base: Type[nn.Module]) -> None:
        self.activation_fn = _identity  # the experts apply both
        self.activation_dropout_module = nn.Identity()
        name_dropout(self, base.__name__)  # type: ignore[arg-type]  # a layer, once mixed in
        self.fc1.dropout_name = base.__name__

    def build_fc1(self, input_dim: int, output_dim: int, q_noise: float, qn_block_size: int) -> nn.Module:
        cfg = self.moe_cfg
        moe = build_moe_layer(
            cfg.router,
            input_dim,
            cfg.expert_ffn_embed_dim or output_dim,
            cfg.num_experts,
            activation=cfg.expert_activation or dense_activation(cfg),
            dropout=expert_dropout(cfg),
            num_shared_experts=cfg.num_shared_experts,
            cmr=conditional_routing(cfg, input_dim, output_dim),
            eom=cfg.moe_eom,
            fom=cfg.moe_fom,
            **router_options(cfg),
        )
        if cfg.expert_lora_rank is not None:
            moe.experts.add_adapters(cfg.expert_lora_rank, cfg.expert_lora_alpha)
        for experts in moe.modules():
            if isinstance(experts, Experts):  # shared ones, too
                experts.recompute = cfg.checkpoint_experts
        return _FeedForward(moe)

    def build_fc2(self, input_dim: int, output_dim: int, q_noise: float, qn_block_size: int) -> nn.Module:
        return _NoLayer()

    def _run(self, forward: Callable, padding_mask: Optional[Tensor], *args, **kwargs):
        """fairseq's forward, with the padding mask [B, T] transposed to match the layer's x [T, B, M]."""

        token_ids = self.fc1.token_ids

        def with_mask(*args, **kwargs):  # recomputed too: another forward may run before the backward
            self.fc1.padding_mask = None if padding_mask is None else padding_mask.t()
            self.fc1.token_ids = token_ids
            return forward(*args, **kwargs)

        if not (self.moe_cfg.checkpoint_activations and self.training and torch.is_grad_enabled()):
            return with_mask(*args, **kwargs)
        # Not reentrant, so that the auxiliary losses, which are not outputs of this call, keep their graph.
        with torch.autograd.graph.save_on_cpu() if self.moe_cfg.offload_activations else nullcontext():
            return checkpoint(with_mask, *args, use_reentrant=False, **kwargs)


class MoEEncoderLayer(_MoEBlock, NoFastPath, TransformerEncoderLayerBase):
    """fairseq's encoder layer with experts."""

    def __init__(self, cfg: Any, return_fc: bool = False):
        self._prepare(cfg)
        super().__init__(cfg, return_fc=return_fc)
        self._finish(TransformerEncoderLayerBase)

    def forward(self, x: Tensor, encoder_padding_mask: Optional[Tensor], attn_mask: Optional[Tensor] = None):
        """See TransformerEncoderLayerBase.forward."""
        return self._run(super().forward, encoder_padding_mask, x, encoder_padding_mask, attn_mask)


class MoEDecoderLayer(_MoEBlock, TransformerDecoderLayerBase):
    """fairseq's decoder layer with experts."""

    def __init__(self, cfg: Any, no_encoder_attn: bool = False):
        self._prepare(cfg)
        super().__init__(cfg, no_encoder_attn)
        self._finish(TransformerDecoderLayerBase)

    def forward(self, x: Tensor, *args, self_attn_padding_mask: Optional[Tensor] = None, **kwargs):
        """See TransformerDecoderLayerBase.forward."""
        return self._run(
            super().forward, self_attn_padding_mask, x, *args, self_attn_padding_mask=self_attn_padding_mask, **kwargs
        )


class ChoosesLayers:
    """Mixin for an encoder or decoder: decides which of the layers built in sequence have experts, see layer_choice.

    In a pruned model (--encoder-layers-to-keep, --decoder-layers-to-keep), these are the MoE layers of the full model.
    """

    stack = ""  # encoder or decoder
    _built = 0

    def next_layer_config(self, cfg: Any) -> Any:
        """The configuration of the MoE layer being built, with its own num_experts; None for a dense layer. Call once a layer."""
        kept = layers_to_keep(cfg, self.stack)
        index = kept[self._built] if kept else self._built
        self._built += 1
        num_layers = UNKNOWN if kept else getattr(cfg, self.stack).layers
        num_experts = experts_in_layer(cfg, self.stack, index, num_layers)
        return with_experts(cfg, num_experts) if num_experts else None


class RemembersUpdates:
    """Mixin for a model: stores the number of updates, for code that depends on it in training."""

    num_updates = 0

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq with the updates done so far."""
        super().set_num_updates(num_updates)  # type: ignore[misc]  # of the class behind this one
        self.num_updates = num_updates
