"""The Mixture-of-Experts layer: gate -> dispatch -> experts -> combine.

Arguments and results carry the data. The exceptions, where a framework's call lies in between, are these attributes:

    set by                        attribute                               read by
    MoELayer.forward              MoELayer.routing                        criterions, for auxiliary losses and metrics
    trainer, before a dummy batch MoELayer.idle                           MoELayer.forward
    trainer, before each batch    MoELayer.stay_on_rank                   MoELayer.dispatch, for gating dropout
    --moe-trace, --moe-replay     MoELayer.follower                       MoELayer.forward, to record or replace the routing
    trainer, at start-up          MoELayer.expert_group                   MoELayer.dispatch
    trainer, at start-up          Gate.balance_scope                      Gate.decide, for the balance loss
    trainer, before an update     Update's sums                           UpdateScope, with --balance-scope update
    taking_turns                  MoELayer.turns                          MoELayer.forward, to wait for other ranks
    the backward pass             StepState.pending                       update_step_states, after the step
    fairseq's layer (moe_block)   _FeedForward.padding_mask, token_ids    _FeedForward.forward: fairseq calls fc1 with x only
    --retain-dropout              Experts.drop_at_inference               Experts.forward
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.moe.cmr import ConditionalRouting
from fairseq_sparsemixer.moe.dispatch import dispatch_all_to_all, dispatch_equal_split, dispatch_fused, dispatch_locally
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.gates import Gate, Routing, build_gate
from fairseq_sparsemixer.moe.gating_dropout import to_local_experts
from fairseq_sparsemixer.moe.output_masking import mask_experts, mask_output, require_masking
from fairseq_sparsemixer.moe.parallel import ExpertGroup
from fairseq_sparsemixer.moe.turns import Turns
from fairseq_sparsemixer.names import WRAPPERS, transformer_layer

with warnings.catch_warnings():  # fairscale uses deprecated torch.cuda.amp names
    warnings.simplefilter("ignore", FutureWarning)
    from fairscale.nn.moe import MOELayer

# (routing, tokens [S, M], shape of the tokens before [S], token_ids of this shape or None) -> the routing to use
Follower = Callable[[Routing, Tensor, Tuple[int, ...], Optional[Tensor]], Routing]


class MoELayer(MOELayer):  # type: ignore[misc]  # fairscale has no annotations
    """A feed-forward layer of E experts behind a gate, a replacement for fairscale's MOELayer.

    The forward is linear in tokens, and needs no process group and no particular divisor of the token count. `routing` is
    the Routing of the last forward; None before the first. `shared_experts`, if any, run on every token that is not padding
    and are added unweighted (DeepSeekMoE, arXiv 2401.06066, Eq. 9). `cmr`, if any, mixes the output with a shared network's
    (cmr.py); `eom` and `fom` are probabilities (output_masking.py). While `stay_on_rank` is set, on all ranks of the group,
    tokens use the experts of their own rank (gating_dropout.py). While `idle` is set, every token counts as padding: a rank
    that has run out of data joins the collectives and contributes nothing else.
    """

    def __init__(
        self,
        gate: Gate,
        experts: Experts,
        shared_experts: Optional[Experts] = None,
        cmr: Optional[ConditionalRouting] = None,
        eom: float = 0.0,
        fom: float = 0.0,
    ):
        nn.Module.__init__(self)  # fairscale's __init__ requires a process group
        require_masking(gate, eom, fom)
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts
        self.cmr = cmr
        self.eom, self.fom = eom, fom
        self.expert_group: Optional[ExpertGroup] = None  # the ranks that share the experts; see shard_experts
        self.routing: Optional[Routing] = None
        self.idle = self.stay_on_rank = False
        self.turns: Optional[Turns] = None  # in generation; see turns.py
        self.follower: Optional[Follower] = None  # sees every routing, and may replace it; see tracing.py

    @property
    def l_aux(self) -> Optional[Tensor]:
        """The unweighted balance loss of the last forward, under fairscale's name."""
        return None if self.routing is None else self.routing.aux_losses.get("balance")

    @property
    def wants_token_ids(self) -> bool:
        """Whether models should pass token ids to the layer."""
        return self.gate.wants_token_ids or self.follower is not None

    @property
    def num_local_experts(self) -> int:
        """The number of experts on this rank."""
        return self.gate.num_experts // (1 if self.expert_group is None else self.expert_group.size)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None, token_ids: Optional[Tensor] = None) -> Tensor:
        """x [..., M], padding_mask [...] (True = padding), token_ids [...] if known -> [..., M], zero at padding.

        With more than two dimensions, the last but one counts the sequences, as in fairseq's [T, B, M].
        Raises ValueError if the shapes do not match.
        """
        model_dim = self.gate.model_dim
        if x.size(-1) != model_dim:
            raise ValueError(f"x has width {x.size(-1)}, but the layer was built for model_dim={model_dim}")
        if padding_mask is not None:
            if padding_mask.shape != x.shape[:-1]:
                raise ValueError(f"padding_mask of shape {tuple(padding_mask.shape)} does not match x of {tuple(x.shape)}")
            padding_mask = padding_mask.reshape(-1).bool()
        if self.turns is not None:
            self.turns.wait_for(self)
        tokens = x.reshape(-1, model_dim)  # [S, M]
        if self.idle:
            padding_mask = torch.ones(len(tokens), dtype=torch.bool, device=x.device)
        known = {"token_ids": token_ids.reshape(-1)} if token_ids is not None and self.gate.wants_token_ids else {}
        if self.gate.balance_scope is not None:
            self.gate.balance_scope.restart(x.size(-2) if x.dim() > 2 else 1)
        routing = self.gate(tokens, padding_mask, **known)
        if self.follower is not None:
            routing = self.follower(routing, tokens, x.shape[:-1], token_ids)
        if routing.tokens is not None:
            tokens, routing = routing.tokens, replace(routing, tokens=None)
        self.routing = routing
        shared: List[Tensor] = []  # filled while tokens travel, or after
        run_shared = partial(self._run_shared_experts, tokens, padding_mask, shared)
        output = self.dispatch(tokens, mask_experts(routing, self.eom, self.training), run_shared)
        run_shared()
        if shared:
            output = output + shared[0]
        if self.cmr is not None:
            output, cmr_gate = self.cmr(tokens, output, padding_mask)
            self.routing = replace(routing, cmr_gate=cmr_gate)
        output = mask_output(output, self.fom, self.training).reshape(x.shape)
        return output if routing.amount is None else routing.amount.watch(output)

    def _run_shared_experts(self, tokens: Tensor, padding_mask: Optional[Tensor], outputs: List[Tensor]) -> None:
        """Append the output of the shared experts [S, M], if there are any, unless it is there."""
        if self.shared_experts is None or outputs:
            return
        output = self.shared_experts(tokens, [tokens.size(0)])
        outputs.append(output if padding_mask is None else output.masked_fill(padding_mask.unsqueeze(-1), 0))

    @torch.no_grad()
    def join(self) -> None:
        """Take part in a forward of the other ranks without tokens, for inference; `routing` is unchanged."""
        none = next(self.experts.parameters()).new_empty(0, self.gate.model_dim)
        self.dispatch(none, self.gate(none))

    def dispatch(self, tokens: Tensor, routing: Routing, meanwhile: Callable[[], object] = lambda: None) -> Tensor:
        """Run tokens [S, M] through the experts chosen by the routing, on whichever rank they are -> [S, M].

        `meanwhile` may be called while tokens travel.
        """
        fused, on_device = self.experts.is_fused(tokens), self.experts.takes_device_counts(tokens)
        stays = self.stay_on_rank and self.turns is None  # generation within a training step is inference
        if self.expert_group is None or stays:
            local = to_local_experts(routing, self.num_local_experts) if self.expert_group is not None else routing
            if fused:
                return dispatch_fused(tokens, local, self.experts)
            return dispatch_locally(tokens.to(self.experts.precision(tokens)), local, self.experts, on_device)
        tokens = tokens.to(self.experts.precision(tokens))  # before copying and sending: under autocast, half the bytes
        if routing.dropped is None or not self.expert_group.in_one_exchange:
            return dispatch_all_to_all(tokens, routing, self.experts, self.expert_group, on_device, fused, meanwhile)
        return dispatch_equal_split(tokens, routing, self.experts, self.expert_group, on_device, fused)

    def shard_experts(self, expert_group: ExpertGroup) -> None:
        """Keep only this rank's shard of the experts; forward then is a collective of the group.

        Marks the remaining parameters as `expert`, so that fairseq and fairscale exclude them from gradient reduction.
        """
        self.expert_group = expert_group if expert_group.size > 1 else None  # alone, a rank exchanges nothing
        self.experts.shard(expert_group.index * self.num_local_experts, self.num_local_experts)
        for parameter in self.experts.parameters():
            parameter.expert = True  # type: ignore[attr-defined]  # fairscale's mark

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script calls this on every module first
        raise NotImplementedError(
            "torch.jit.script cannot compile an MoE layer, whose control flow depends on data; use it unscripted"
        )

    def __getstate__(self) -> Dict[str, Any]:
        # a copy or pickle of the layer (fairseq's EMA makes one) must not carry the last forward's graph or the state of a step
        return {**self.__dict__, "routing": None, "idle": False, "stay_on_rank": False, "turns": None, "follower": None}


def moe_layers(model: nn.Module) -> List[MoELayer]:
    """The MoE layers of a model, in module order."""
    return [layer for layer in model.modules() if isinstance(layer, MoELayer)]


def named_moe_layers(model: nn.Module) -> List[Tuple[str, MoELayer]]:
    """(name, layer) of each MoE layer; the name is that of the enclosing transformer layer, without wrappers for DDP."""
    named = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, MoELayer))
    return [(transformer_layer(WRAPPERS.sub("", name)), layer) for name, layer in named]


def shard_experts(model: nn.Module, expert_group: ExpertGroup) -> None:
    """Shard the experts of every layer of `model`, before it is wrapped for data parallelism; see MoELayer.shard_experts.

    Raises ValueError for a layer whose experts cannot be sharded evenly.
    """
    for layer in moe_layers(model):
        if layer.gate.num_experts % expert_group.size:
            raise ValueError(f"{layer.gate.num_experts} experts cannot be split over {expert_group.size} ranks")
        layer.shard_experts(expert_group)
    # torch's DistributedDataParallel reads this list: experts differ by rank
    model._ddp_params_and_buffers_to_ignore = [
        name for name, parameter in model.named_parameters() if hasattr(parameter, "expert")
    ]  # type: ignore[assignment]  # torch sets the name in this way, too


spread_experts = shard_experts  # the former name


def build_moe_layer(
    router: str,
    model_dim: int,
    hidden_dim: int,
    num_experts: int,
    activation: Union[str, Callable[[Tensor], Tensor]] = "relu",
    dropout: float = 0.0,
    num_shared_experts: int = 0,
    cmr: Optional[ConditionalRouting] = None,
    eom: float = 0.0,
    fom: float = 0.0,
    **gate_options: Any,
) -> MoELayer:
    """A layer of num_experts experts model_dim -> hidden_dim -> model_dim behind the gate `router`.

    `activation` and `dropout` are passed to Experts, gate_options to build_gate. The num_shared_experts shared experts are
    one network of their total width, which equals their sum. cmr, eom and fom: see MoELayer. Raises ValueError, naming the
    option, for invalid values.
    """
    if num_shared_experts < 0:
        raise ValueError(f"num_shared_experts={num_shared_experts} must not be negative")
    gate = build_gate(router, model_dim, num_experts, **gate_options)
    experts = Experts(num_experts, model_dim, hidden_dim, activation, dropout)
    shared = Experts(1, model_dim, num_shared_experts * hidden_dim, activation, dropout) if num_shared_experts else None
    return MoELayer(gate, experts, shared, cmr, eom, fom)
