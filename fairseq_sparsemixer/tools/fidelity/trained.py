"""A problem from a trained model: one MoE layer of a checkpoint, on the tokens of a given text.

For a token s, g_s(y) is the training criterion's loss of the whole sentence when the layer's output for s is y.
Everything else is fixed at its inference value: the layer's output for the other tokens, and the choices and multipliers
of every other MoE layer for all tokens. So g_s runs through attention, normalisation, experts and output layer as in
training, and is as smooth as they are. T positions per sentence, R evaluations at once.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq import utils
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import Gate, Routing
from fairseq_sparsemixer.moe.layer import MoELayer, named_moe_layers
from fairseq_sparsemixer.tools.fidelity.problem import Problem
from fairseq_sparsemixer.tools.sentences import load_model, make_sample, read_pairs, translates

POSITIONS = 8192  # limit of R T, to bound the memory of one pass through the model


@dataclass(frozen=True)
class FrozenContext:
    """The values of one sentence in the model at inference.

    sample: a fairseq batch of this sentence only. inputs: [T, M], of the layer. outputs: [T, E, M], of every expert.
    outcome: [T, M], the layer's output. rest: [T, M], the part of it that does not come from routed experts (shared
    experts; else zero). routings: of all other MoE layers, with their gates.
    """

    sample: Dict[str, Any]
    inputs: Tensor
    outputs: Tensor
    outcome: Tensor
    rest: Tensor
    routings: List[Tuple[Gate, Routing]]


def trained_problem(
    checkpoint: str,
    text: str,
    target: str,
    layer: Optional[str] = None,
    data_bin: Optional[str] = None,
    max_tokens: int = 64,
    jitter_eps: Optional[float] = None,
) -> Problem:
    """The problem of the layer's first max_tokens tokens of the text.

    checkpoint: of a translation model with experts. text, target: files of sentences, in the subwords of the model's
    training data. layer: a name from `named_moe_layers`; None: the first. data_bin: the folder of the dictionaries; None:
    the one the model was trained on. jitter_eps: None: the router's own. Raises ConfigurationError for unusable files.
    """
    sentences = read_pairs(text, target)
    model, criterion, task = load_model(checkpoint, data_bin)
    if not translates(model):
        raise ConfigurationError(f"{checkpoint} is not a translation model; give a checkpoint of transformer_moe")
    name, moe = find_layer(model, layer, checkpoint)
    contexts: List[FrozenContext] = []
    tokens = 0
    for source_line, target_line in sentences:
        contexts.append(record_context(model, moe, criterion, make_sample(task, source_line, target_line)))
        tokens += len(contexts[-1].inputs)
        if tokens >= max_tokens:
            break
    inputs = torch.cat([context.inputs for context in contexts])[:max_tokens]
    gate: Any = moe.gate
    if jitter_eps is None and hasattr(gate, "estimator"):
        jitter_eps = gate.jitter_eps  # sampling routers mask by it; others add noise
    return Problem(
        tokens=inputs,
        logits=moe.gate.logits(inputs).detach(),
        outputs=torch.cat([context.outputs for context in contexts])[:max_tokens],
        loss=DownstreamLoss(model, criterion, moe, contexts, len(inputs)),
        jitter_eps=jitter_eps,
        description=f"{name} of {Path(checkpoint).name} (router {moe.gate.router}, {moe.gate.num_experts} experts),"
        f" {len(inputs)} tokens of {len(contexts)} sentence{'s' * (len(contexts) > 1)}",
    )


def find_layer(model: nn.Module, layer: Optional[str], checkpoint: str) -> Tuple[str, MoELayer]:
    """(name, MoE layer). Raises ConfigurationError if there is no such layer, or it gives each token several experts."""
    layers = dict(named_moe_layers(model))
    if not layers:
        raise ConfigurationError(f"--checkpoint {checkpoint} has no MoE layer; give one trained with a --router other than dense")
    name = layer or next(iter(layers))
    if name not in layers:
        raise ConfigurationError(f"--layer {layer} is not an MoE layer of {checkpoint}; choose from {', '.join(layers)}")
    if layers[name].gate.top_k != 1:
        raise ConfigurationError(
            f"{name} of {checkpoint} gives each token {layers[name].gate.top_k} experts, but fidelity needs k = 1;"
            " give a checkpoint trained with --moe-top-k 1"
        )
    if layers[name].cmr is not None or layers[name].eom or layers[name].fom:
        raise ConfigurationError(
            f"{checkpoint} was trained with --moe-eom, --moe-fom or --moe-cmr, which change the outputs that fidelity"
            " compares; give a checkpoint trained without"
        )
    gate = layers[name].gate
    routing = gate(layers[name].experts.weight_in.new_zeros(0, gate.model_dim))
    if routing.skipped is not None or routing.default is not None:
        raise ConfigurationError(
            f"--router {gate.router} of {checkpoint} does not make a token's output from one expert alone, as fidelity needs;"
            " give a checkpoint trained with another router"
        )
    return name, layers[name]


def record_context(model: nn.Module, moe: MoELayer, criterion: nn.Module, sample: Dict[str, Any]) -> FrozenContext:
    """Run the model once in inference, and record the layer's values and the other gates' routings."""
    seen: Dict[str, Tensor] = {}
    hook = moe.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs[0], outcome=output))
    with double_softmax(), torch.no_grad():
        criterion(model, sample, reduce=False)
    hook.remove()
    assert moe.routing is not None
    inputs, outcome = (seen[name].flatten(0, -2) for name in ("inputs", "outcome"))  # [T, M]: a batch of one
    outputs = every_expert(moe, inputs)
    chosen = outputs[torch.arange(len(inputs)), moe.routing.expert_index.squeeze(1)]  # one expert per token
    routed = moe.routing.combine_weight * chosen
    others = [(layer.gate, layer.routing) for _, layer in named_moe_layers(model) if layer is not moe and layer.routing]
    return FrozenContext(sample, inputs, outputs, outcome, outcome - routed, others)


@torch.no_grad()
def every_expert(moe: MoELayer, inputs: Tensor) -> Tensor:
    """Outputs [T, E, M] of every expert for inputs [T, M], with the layer's output scale."""
    count, E = len(inputs), moe.gate.num_experts
    outputs = moe.experts(inputs.repeat(E, 1), [count] * E).view(E, count, -1)
    if moe.routing is not None and moe.routing.output_scale is not None:
        outputs = outputs * moe.routing.output_scale
    return outputs.transpose(0, 1)


class DownstreamLoss:
    """g_s for every token: y [..., S, M] -> [..., S]. Gradients are computed in the forward pass, to bound memory."""

    def __init__(self, model: nn.Module, criterion: nn.Module, moe: MoELayer, contexts: List[FrozenContext], tokens: int):
        self.model, self.criterion, self.moe, self.contexts, self.tokens = model, criterion, moe, contexts, tokens

    def __call__(self, y: Tensor) -> Tensor:
        return _Eager.apply(y.reshape(-1, self.tokens, y.size(-1)), self).view(y.shape[:-1])

    def with_gradient(self, y: Tensor) -> Tuple[Tensor, Tensor]:
        """y [O, S, M] -> losses [O, S] and their gradients [O, S, M]."""
        losses, gradients, start = [], [], 0
        for context in self.contexts:
            stop = min(start + len(context.inputs), self.tokens)
            position = torch.arange(stop - start).expand(len(y), -1).reshape(-1)  # [R]
            rows = y[:, start:stop].reshape(-1, y.size(-1)).split(max(POSITIONS // len(context.inputs), 1))
            pairs = [self._run(context, part, where) for part, where in zip(rows, position.split(len(rows[0])))]
            losses.append(torch.cat([loss for loss, _ in pairs]).view(len(y), -1))
            gradients.append(torch.cat([gradient for _, gradient in pairs]).view(len(y), stop - start, -1))
            start = stop
        return torch.cat(losses, 1), torch.cat(gradients, 1)

    def _run(self, context: FrozenContext, y: Tensor, position: Tensor) -> Tuple[Tensor, Tensor]:
        """R copies of the sentence, each with its y [R, M] at its position [R] -> losses [R], gradients [R, M]."""
        y = y.detach().requires_grad_()
        with torch.enable_grad(), frozen(context, self.moe, y, position), double_softmax():
            loss, _, _ = self.criterion(self.model, repeat_sample(context.sample, len(y)), reduce=False)
            loss = loss.view(len(y), -1).sum(1)
            return loss.detach(), torch.autograd.grad(loss.sum(), y)[0]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, loss: DownstreamLoss) -> Tensor:
        losses, gradients = loss.with_gradient(y)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Tensor, None]:
        return grad.unsqueeze(-1) * ctx.saved_tensors[0], None


def repeat_sample(sample: Dict[str, Any], count: int) -> Dict[str, Any]:
    """A batch of `count` copies of one sentence."""
    net_input = {name: value.expand(count, *value.shape[1:]) for name, value in sample["net_input"].items()}
    return {"net_input": net_input, "target": sample["target"].repeat(count, 1), "ntokens": sample["ntokens"] * count}


@contextmanager
def frozen(context: FrozenContext, moe: MoELayer, y: Tensor, position: Tensor) -> Iterator[None]:
    """In this context, the layer returns its recorded outcome with y [R, M] at position [R]; other gates their routings."""
    count = len(y)

    def layer(x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:  # x [T, R, M]
        output = context.outcome.unsqueeze(1).repeat(1, count, 1)
        output[position, torch.arange(count)] = y + context.rest[position]
        return output

    with ExitStack() as stack:
        stack.enter_context(swapped(moe, "forward", layer))
        for gate, routing in context.routings:
            again = repeat_routing(routing, count)
            stack.enter_context(swapped(gate, "forward", lambda tokens, padding_mask=None, again=again: again))
        yield


def repeat_routing(routing: Routing, count: int) -> Routing:
    """The routing of one sentence's positions [T], repeated for `count` copies of the sentence: [T count]."""

    def repeat(value: Any) -> Any:
        return None if value is None else value.repeat_interleave(count, 0)

    return replace(
        routing,
        expert_index=repeat(routing.expert_index),
        combine_weight=repeat(routing.combine_weight),
        probabilities=repeat(routing.probabilities),
        padding_mask=repeat(routing.padding_mask),
        dropped=repeat(routing.dropped),
        aux_losses={},
    )


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """In this context, owner.name is value."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


@contextmanager
def double_softmax() -> Iterator[None]:
    """In this context, fairseq's softmaxes keep float64 inputs in float64 instead of computing in float32."""
    softmax = lambda x, dim, onnx_trace=False: F.softmax(x, dim=dim)  # noqa: E731
    log_softmax = lambda x, dim, onnx_trace=False: F.log_softmax(x, dim=dim)  # noqa: E731
    with swapped(utils, "softmax", softmax), swapped(utils, "log_softmax", log_softmax):
        yield
