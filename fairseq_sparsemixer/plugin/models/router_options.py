"""Maps flags to a router's options."""

from typing import Any, Dict, Optional, Tuple, get_args, get_type_hints

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import gate_class, gate_options, routers_with
from fairseq_sparsemixer.options import FIELDS, FLAGS, in_flags

WORDS = {"true": True, "false": False, "none": None}


def router_options(cfg: Any) -> Dict[str, Any]:
    """The options of cfg.router set by flags; a flag at its default keeps the router's default.

    Raises ConfigurationError for a flag that this router does not support, listing the routers that do.
    """
    with in_flags():
        accepted = gate_options(cfg.router)
    if cfg.moe_top_k is not None and not 1 <= cfg.moe_top_k <= cfg.num_experts:
        raise ConfigurationError(f"--moe-top-k {cfg.moe_top_k} must lie between 1 and --num-experts {cfg.num_experts}")
    chosen = {}
    for option, field in FIELDS.items():
        value = getattr(cfg, field.name)
        if option in accepted:
            if value is not None:
                chosen[option] = value
        elif value != field.default and not (option == "top_k" and value == gate_class(cfg.router).top_k):
            raise ConfigurationError(_refusal(option, value, cfg.router))
    return {**chosen, **named_options(cfg.router, getattr(cfg, "router_option", None))}


def _refusal(option: str, value: Any, router: str) -> str:
    why = FIELDS[option].metadata.get("refusal", "which has no use for it")
    if option == "top_k":
        why = f"which gives each token {gate_class(router).top_k}"
    others = ", ".join(routers_with(option))
    return f"{FLAGS[option]} {value} does not work with --router {router}, {why}; routers that take it: {others}"


def named_options(router: str, text: Optional[str]) -> Dict[str, Any]:
    """Names and values given by --router-option, of the kinds that the router's constructor names.

    Raises ConfigurationError for options that the router does not take, and for values of another kind.
    """
    given: Dict[str, Any] = {}
    for pair in text.split(",") if text else []:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            raise ConfigurationError(f"--router-option {text} must be NAME=VALUE, or several of them separated by commas")
        if name in FIELDS:
            raise ConfigurationError(f"--router-option {name}={value} has its own flag; give {FLAGS[name]} {value}")
        own = [option for option in gate_options(router) if option not in FIELDS]
        if name not in own:
            takes = f"it takes {', '.join(own)}" if own else "it takes none besides its flags"
            raise ConfigurationError(f"--router-option {name}={value} does not work with --router {router}; {takes}")
        if name in given:
            raise ConfigurationError(f"--router-option {text} gives {name} twice; give it once")
        given[name], kind = _of_kind(value, _annotations(router).get(name))
        if kind:
            raise ConfigurationError(f"--router-option {name}={value} must be {kind}")
    return given


def _annotations(router: str) -> Dict[str, Any]:
    """The types of a router's options; none if they cannot be resolved."""
    try:
        return get_type_hints(gate_class(router).__init__)
    except NameError:  # imported for type checkers only
        return {}


def _of_kind(text: str, annotation: Any) -> Tuple[Any, str]:
    """The text as a value of the annotated type, and nothing; or what it must be instead. Without a known type, anything."""
    value, kinds = _value(text), get_args(annotation) or (annotation,)
    if value is None and type(None) in kinds:
        return None, ""
    if str in kinds:
        return text, ""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if bool in kinds:
        return (bool(value), "") if isinstance(value, (bool, int)) and value in (0, 1) else (value, "true or false")
    if float in kinds:
        return value, "" if number else "a number"
    if int in kinds:
        return (int(value), "") if number and float(value).is_integer() else (value, "a whole number")
    return value, ""


def _value(text: str) -> Any:
    """The text as a number, true, false or none if it is one, else unchanged."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
