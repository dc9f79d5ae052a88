"""Which layers of a stack have experts, and how many: the one answer for models, upcycling, and pruned models.

    --encoder-moe-layers, --decoder-moe-layers
    1,3,5          layers 1, 3 and 5, counted from 0
    1:8,3:16       layer 1 with 8 experts, layer 3 with 16
    all, none      every layer, no layer
    last:4         the last 4 layers
    every:2:1      every second layer, from layer 1 on (every:2 is every:2:0)

Without them, --moe-freq N puts experts in every N-th layer, from layer 0 on.
"""

import copy
import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Sequence, Set

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE

STACKS = ("encoder", "decoder")
UNKNOWN = 10_000  # layers: above those of any model, for a pruned one, whose flags name layers of the full one
FORMS = "a list such as 1,3,5 or 1:8,3:16, or all, none, last:4, every:2 or every:2:1"
ITEM = re.compile(r"(\d{1,6})(?::(\d{1,9}))?")
LAST = re.compile(r"last:(\d{1,6})")
EVERY = re.compile(r"every:(\d{1,6})(?::(\d{1,6}))?")


def experts_in_layer(cfg: Any, stack: str, index: int, num_layers: int) -> int:
    """The number of experts of layer `index` of a stack of num_layers; 0 for a dense layer. Raises ConfigurationError."""
    if cfg.router == DENSE:
        return 0
    chosen = experts_by_layer(cfg, stack, num_layers)
    if chosen is not None:
        return chosen.get(index, 0)
    return cfg.num_experts if index % cfg.moe_freq == 0 else 0  # a pruned model has layers beyond num_layers


def experts_by_layer(cfg: Any, stack: str, num_layers: int) -> Optional[Dict[int, int]]:
    """{layer: number of experts} if flags choose the layers of this stack, else None. Raises ConfigurationError."""
    text = given(cfg, stack)
    only_encoder = stack == "decoder" and getattr(cfg, "moe_encoder_only", False)
    if text is None:
        return {} if only_encoder else None
    flag = f"--{stack}-moe-layers {text}"
    chosen = _parse(flag, text.strip().lower(), num_layers, cfg.num_experts)
    if chosen and only_encoder:
        raise ConfigurationError(f"{flag} contradicts --moe-encoder-only; leave one of them out")
    return chosen


def stack_option(cfg: Any, stack: str, name: str) -> Any:
    """The option `stack_name`; None if not given. fairseq's TransformerConfig keeps `encoder_*` in its part `encoder`."""
    of_stack = getattr(getattr(cfg, stack, None), name, None)
    return getattr(cfg, f"{stack}_{name}", None) if of_stack is None else of_stack


def given(cfg: Any, stack: str) -> Optional[str]:
    """The flag that chooses the layers of a stack; None if not given."""
    return listed(stack_option(cfg, stack, "moe_layers"))


def listed(value: Any) -> Optional[str]:
    """A list of layers as the command line has it; a YAML file may have a number or a list, and fairseq makes a list of some."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return None if value is None else str(value)


def resolve_layers(cfg: Any, layers: Dict[str, int]) -> None:
    """Replace the flags by explicit lists, so that a checkpoint says which layers have experts whatever its depth.

    layers: the number of layers of each stack that the model has. Raises ConfigurationError for layers that do not exist, for
    a flag of a stack that the model does not have, and if no layer has experts.
    """
    for stack in STACKS:
        text = given(cfg, stack)
        if text is None or cfg.router == DENSE:
            continue
        if stack not in layers:
            raise ConfigurationError(f"--{stack}-moe-layers {text} does not apply to a model without {stack}; leave it out")
        chosen = experts_by_layer(cfg, stack, layers[stack]) or {}
        setattr(cfg, f"{stack}_moe_layers", ",".join(_item(cfg, *pair) for pair in sorted(chosen.items())) or "none")
    if cfg.router != DENSE and layers and not any(has_experts(cfg, stack, count) for stack, count in layers.items()):
        raise ConfigurationError("the flags leave no layer with experts; give other --encoder-moe-layers, or --router dense")


def layers_of_pruned(cfg: Any, stack: str, kept: Sequence[int]) -> str:
    """The explicit list of a stack of which only the layers `kept`, in order, are left. Raises ConfigurationError."""
    experts = [experts_in_layer(cfg, stack, index, UNKNOWN) for index in kept]
    return ",".join(_item(cfg, layer, count) for layer, count in enumerate(experts) if count) or "none"


def configurations(cfg: Any, layers: Dict[str, int]) -> Dict[int, Any]:
    """{number of experts: cfg with that number}, of all layers of these stacks."""
    counts = {experts_in_layer(cfg, stack, index, count) for stack, count in layers.items() for index in range(count)}
    return {number: with_experts(cfg, number) for number in sorted(counts - {0})}


@contextmanager
def of_some_layers(cfg: Any, numbers: Set[int]) -> Iterator[None]:
    """Add to an error about --num-experts that layers have these numbers of experts of their own, if they do."""
    try:
        yield
    except ConfigurationError as error:
        if numbers == {cfg.num_experts}:
            raise
        own = f"{', '.join(map(str, sorted(numbers)))} experts by --encoder-moe-layers, --decoder-moe-layers"
        raise ConfigurationError(f"{error.message}; layers have {own}") from None


def with_experts(cfg: Any, num_experts: int) -> Any:
    """cfg, or a copy of it with another number of experts."""
    if num_experts == cfg.num_experts:
        return cfg
    own = copy.copy(cfg)
    own.num_experts = num_experts
    return own


def has_experts(cfg: Any, stack: str, num_layers: int) -> bool:
    """Whether a layer of this stack of num_layers layers has experts. Raises ConfigurationError."""
    return any(experts_in_layer(cfg, stack, index, num_layers) for index in range(num_layers))


def _item(cfg: Any, layer: int, experts: int) -> str:
    return f"{layer}" if experts == cfg.num_experts else f"{layer}:{experts}"


def _parse(flag: str, text: str, num_layers: int, num_experts: int) -> Dict[int, int]:
    if text == "none":
        return {}
    if text == "all":
        return dict.fromkeys(range(num_layers), num_experts)
    if last := LAST.fullmatch(text):
        count = int(last[1])
        if not 1 <= count <= num_layers:
            raise ConfigurationError(f"{flag} must keep between 1 and {num_layers} layers, the number there is")
        return dict.fromkeys(range(num_layers - count, num_layers), num_experts)
    if every := EVERY.fullmatch(text):
        step, start = int(every[1]), int(every[2] or 0)
        if step < 1 or start >= num_layers:
            raise ConfigurationError(
                f"{flag} must have a step of at least 1 and a start below {num_layers}, the number of layers"
            )
        return dict.fromkeys(range(start, num_layers, step), num_experts)
    return _parse_list(flag, text, num_layers, num_experts)


def _parse_list(flag: str, text: str, num_layers: int, num_experts: int) -> Dict[int, int]:
    chosen: Dict[int, int] = {}
    for item in text.split(","):
        match = ITEM.fullmatch(item.strip())
        if match is None:
            raise ConfigurationError(f"{flag} must be {FORMS}")
        layer, experts = int(match[1]), int(match[2]) if match[2] else num_experts
        if layer >= num_layers:
            hint = ""
            if text == str(layer) and layer >= 60:  # YAML 1.1 reads 1:8 as 1 * 60 + 8
                hint = f"; in a YAML file, write '{layer // 60}:{layer % 60}' with quotes"
            raise ConfigurationError(f"{flag} names layer {layer}, but the layers are 0 to {num_layers - 1}{hint}")
        if layer in chosen or experts < 1:
            raise ConfigurationError(f"{flag} must name each layer once, with at least one expert")
        chosen[layer] = experts
    return chosen
