"""Registry of routers: the names that `--router` accepts."""

import inspect
from typing import Any, Callable, Dict, List, Type, TypeVar

from fairseq_sparsemixer.moe.gates.gate import Gate

GateType = TypeVar("GateType", bound=Gate)
GATES: Dict[str, Type[Gate]] = {}
DENSE = "dense"  # not a gate: with `--router dense`, the model keeps fairseq's feed-forward layers


def register_gate(name: str) -> Callable[[Type[GateType]], Type[GateType]]:
    """Class decorator: makes a Gate selectable as `--router name`."""

    def register(cls: Type[GateType]) -> Type[GateType]:
        if name in GATES or name == DENSE:
            raise ValueError(f"a router named {name} is already registered")
        GATES[name] = cls
        cls.router = name
        return cls

    return register


def gate_class(name: str) -> Type[Gate]:
    """The gate class of that name. Raises ValueError, listing the known names, for an unknown one."""
    if name not in GATES:
        raise ValueError(f"router={name} is unknown; choose from {', '.join([DENSE, *sorted(GATES)])}")
    return GATES[name]


def gate_options(name: str) -> List[str]:
    """A gate's options besides model_dim and num_experts; `**balancing` in its signature stands for those of Gate."""
    own = inspect.signature(gate_class(name).__init__).parameters
    balancing = inspect.signature(Gate.__init__).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    named = [option for option, parameter in own.items() if parameter.kind is not parameter.VAR_KEYWORD]
    options = named + (list(balancing) if open_ended else [])
    return [option for option in dict.fromkeys(options) if option not in ("self", "model_dim", "num_experts")]


def routers_with(option: str) -> List[str]:
    """The names of the routers that take an option, sorted."""
    return [name for name in sorted(GATES) if option in gate_options(name)]


def build_gate(name: str, model_dim: int, num_experts: int, **options: Any) -> Gate:
    """Build the gate `name` for tokens of width model_dim and num_experts experts.

    Raises ValueError for an unknown gate (listing the known ones), an option it does not take, or a bad value.
    """
    known = gate_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"router {name} takes no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}")
    return gate_class(name)(model_dim, num_experts, **options)
