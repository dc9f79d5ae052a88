"""fairseq's transformer layers with the feed-forward network replaced by an MoE layer.

A layer's feed-forward network is fc2(dropout(activation(fc1(x)))): fc1 becomes the MoE layer, which does all of it, and the
others identities. Attention, residuals, normalisation and incremental decoding stay fairseq's own lines.
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
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.moe.layer import MoELayer, build_moe_layer
from fairseq_sparsemixer.plugin.models.config import layers_to_keep
from fairseq_sparsemixer.plugin.models.fast_path import NoFastPath
from fairseq_sparsemixer.plugin.models.router_options import router_options


def _identity(x: Tensor) -> Tensor:
    return x


def expert_dropout(cfg: Any) -> float:
    """The dropout inside an expert: its own flag, or what fairseq's feed-forward layers have."""
    if cfg.expert_dropout is not None:
        return cfg.expert_dropout
    return float(cfg.activation_dropout or cfg.relu_dropout or 0)


def name_dropout(module: nn.Module, name: str) -> None:
    """Let --retain-dropout-modules know the module's own dropout by the name that it has in fairseq's model."""
    for dropout in module.children():
        if isinstance(dropout, FairseqDropout):
            dropout.module_name = name


class _NoWeights:
    """Mixed into what stands for fc1 and fc2: fairseq 0.12.2's encoder layer asks for their weights' shapes (see fast_path)."""

    weight = bias = torch.empty(0)


class _NoLayer(_NoWeights, nn.Identity):
    """In fc2's place."""


class _FeedForward(_NoWeights, nn.Module):
    """The MoE layer as fairseq's layer calls its fc1: with x alone. The padding mask and the ids are left here beforehand."""

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
        # torch.jit.script asks each module, from the outermost on
        raise ConfigurationError(
            "torch.jit.script cannot compile a model with experts, which run as Python decides; use the model as it is, or"
            " --router dense"
        )

    def make_generation_fast_(self, name: str, **kwargs) -> None:
        """Called by fairseq before generation: under --retain-dropout, the experts drop out where a dense layer would."""
        dropout = FairseqDropout(self.moe.experts.dropout, self.dropout_name)
        dropout.make_generation_fast_(name, **kwargs)
        for experts in (self.moe.experts, self.moe.shared_experts):
            if experts is not None:
                experts.drop_at_inference = dropout.apply_during_inference


def hand_down_token_ids(layers: Iterable[nn.Module], token_ids: Tensor) -> None:
    """Let the layers of a stack whose gate asks for them know the ids [B, T] of the tokens they are about to see."""
    for layer in layers:
        feed_forward = getattr(layer, "fc1", None)
        if isinstance(feed_forward, _FeedForward) and feed_forward.moe.gate.wants_token_ids:
            feed_forward.token_ids = token_ids.t()


class _MoEBlock:
    """What both kinds of layer share: the hooks that build the feed-forward network, and the way of the padding mask."""

    fc1: _FeedForward
    moe_cfg: Any
    training: bool

    def _prepare(self, cfg: Any) -> None:
        # plain attributes, set before fairseq's constructor calls the build hooks; a decoder layer keeps no cfg itself
        self.__dict__["moe_cfg"] = cfg

    def _finish(self, base: Type[nn.Module]) -> None:
        self.activation_fn = _identity  # the experts have applied both
        self.activation_dropout_module = nn.Identity()
        name_dropout(self, base.__name__)  # type: ignore[arg-type]  # a layer, once mixed in
        self.fc1.dropout_name = base.__name__

    def build_fc1(self, input_dim: int, output_dim: int, q_noise: float, qn_block_size: int) -> nn.Module:
        cfg = self.moe_cfg
        return _FeedForward(
            build_moe_layer(
                cfg.router,
                input_dim,
                output_dim,
                cfg.num_experts,
                activation=cfg.expert_activation or utils.get_activation_fn(str(cfg.activation_fn)),
                dropout=expert_dropout(cfg),
                num_shared_experts=cfg.num_shared_experts,
                **router_options(cfg),
            )
        )

    def build_fc2(self, input_dim: int, output_dim: int, q_noise: float, qn_block_size: int) -> nn.Module:
        return _NoLayer()

    def _run(self, forward: Callable, padding_mask: Optional[Tensor], *args, **kwargs):
        """fairseq's forward, with the padding mask [B, T] at hand as the layer's x [T, B, M] needs it."""

        token_ids = self.fc1.token_ids

        def with_mask(*args, **kwargs):  # inside what is recomputed: another forward may have run before the backward
            self.fc1.padding_mask = None if padding_mask is None else padding_mask.t()
            self.fc1.token_ids = token_ids
            return forward(*args, **kwargs)

        if not (self.moe_cfg.checkpoint_activations and self.training and torch.is_grad_enabled()):
            return with_mask(*args, **kwargs)
        # Not reentrant: the auxiliary losses, which are not outputs of this call, keep their graph.
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


class RoutesEveryNth:
    """Mixed into an encoder or decoder: of the layers built one after the other, which ones route.

    Where a trained model is pruned (--encoder-layers-to-keep, --decoder-layers-to-keep), those that did in the whole one.
    """

    stack = ""  # encoder or decoder
    _built = 0

    def routes_next_layer(self, cfg: Any) -> bool:
        """Whether the layer being built now is an MoE layer; to be asked once a layer."""
        kept = layers_to_keep(cfg, self.stack)
        index = kept[self._built] if kept else self._built
        self._built += 1
        return cfg.router != DENSE and index % cfg.moe_freq == 0


class RemembersUpdates:
    """Mixed into a model: keeps the number of updates that fairseq tells it, for what depends on it in training."""

    num_updates = 0

    def set_num_updates(self, num_updates: int) -> None:
        """Called by fairseq with the updates done so far."""
        super().set_num_updates(num_updates)  # type: ignore[misc]  # of the class behind this one
        self.num_updates = num_updates
