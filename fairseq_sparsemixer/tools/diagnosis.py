"""What this machine and installation can do: versions, which fairseq it is, a model run, a layer trained on each device."""

import platform
from argparse import Namespace
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Callable, List

import torch
from torch import distributed as dist

import fairseq_sparsemixer
from fairseq_sparsemixer.moe.layer import build_moe_layer
from fairseq_sparsemixer.tools.requirements import providers, remedy_for, version

OK, LIMITED, BROKEN = "ok", "limited", "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. remedy: what to do about it; empty where all is well."""

    subject: str
    state: str
    found: str
    remedy: str = ""


def diagnose() -> List[Finding]:
    """Every check, in the order a user would make them."""
    return [
        Finding("fairseq-sparsemixer", OK, f"{fairseq_sparsemixer.__version__} on Python {platform.python_version()}"),
        check_torch(),
        check_fairseq(),
        check_models(),
        *(check_package(name, remedy) for name, remedy in PACKAGES.items()),
        check_balanced_assignment(),
        check_several_ranks(),
        *(check_device(device) for device in devices()),
    ]


PACKAGES = {
    "fairscale": "pip install fairscale==0.4.13",
    "sacrebleu": f"evaluation in BLEU will not work; {remedy_for('tools')}",
    "sentencepiece": f"subword recipes will not work; {remedy_for('tools')}",
    "matplotlib": f"plots will not work; {remedy_for('tools')}",
}


def check_torch() -> Finding:
    """torch, and what it was built for."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 4):
        return Finding("torch", BROKEN, f"{torch.__version__}, {built}", 'needs torch 2.4 or later: pip install "torch>=2.4,<3"')
    return Finding("torch", OK, f"{torch.__version__}, {built}")


def check_fairseq() -> Finding:
    """Which distribution the import package fairseq comes from, and whether it imports."""
    names, spec, remedy = providers("fairseq"), find_spec("fairseq"), remedy_for("fairseq")
    if spec is None:
        return Finding("fairseq", LIMITED, "not installed: layers work, training does not", remedy)
    found = " and ".join(names) or f"in {spec.origin}, of no distribution"
    if names:
        remedy = f"pip uninstall {' '.join(name.split()[0] for name in names)}, then {remedy}"
    if len(names) > 1:
        return Finding("fairseq", BROKEN, found, f"they install the same package over each other; {remedy}")
    try:
        import_module("fairseq.models")
    except Exception as error:  # whatever a fairseq of another Python or torch stumbles over
        return Finding("fairseq", BROKEN, f"{found} does not import ({type(error).__name__})", remedy)
    return Finding("fairseq", OK, found)


def check_models() -> Finding:
    """Whether fairseq knows our models, and builds and runs them: what imports may still not fit."""
    try:
        registry = import_module("fairseq.models").MODEL_REGISTRY
    except Exception:
        return Finding("models", LIMITED, "none, as fairseq does not import", "see fairseq above")
    models = [name for name in registry if name.endswith("_moe")]
    if not models:
        return Finding(
            "models", BROKEN, "none registered", "install fairseq first, then import fairseq_sparsemixer in a new process"
        )
    for router in ("dense", "sparsemixer"):
        try:
            run_model(router)
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            remedy = "this fairseq and this torch do not go together; docs/support.md lists what does"
            return Finding("models", BROKEN, f"transformer_moe with --router {router} does not run ({reason})", remedy)
    return Finding("models", OK, f"{', '.join(sorted(models))}: transformer_moe trains and runs")


def run_model(router: str) -> None:
    """Train a tiny transformer_moe on two sentences, one of them padded, and run it as for generation.

    Raises whatever stops it, and ArithmeticError where an output is not finite.
    """
    from fairseq.data import Dictionary
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEModel, tiny

    words = Dictionary()
    word, end, padding = words.add_symbol("word"), words.eos(), words.pad()
    sizes = {f"{stack}_{size}": 16 for stack in ("encoder", "decoder") for size in ("embed_dim", "ffn_embed_dim")}
    args = Namespace(router=router, num_experts=2, **sizes)
    tiny(args)
    model = TransformerMoEModel.build_model(args, TranslationTask(TranslationConfig(), words, words))
    source, lengths = torch.tensor([[word, word, end], [padding, word, end]]), torch.tensor([3, 2])
    target = torch.tensor([[end, word], [end, word]])
    logits, _ = model(source, lengths, target)
    logits.sum().backward()
    model.eval()
    with torch.no_grad():
        translated, _ = model(source, lengths, target)
    if not (logits.isfinite().all() and translated.isfinite().all()):
        raise ArithmeticError("its output is not finite")


def check_package(name: str, remedy: str) -> Finding:
    """A package that something needs."""
    found = version(name)
    if found is None:
        return Finding(name, BROKEN if name == "fairscale" else LIMITED, "not installed", remedy)
    return Finding(name, OK, found)


def check_balanced_assignment() -> Finding:
    """What `--router base` solves its assignment with."""
    for module in ("fairseq.libbase", "scipy.optimize"):
        try:
            import_module(module)
        except (ImportError, OSError):  # not there, or built against another torch
            continue
        return Finding("--router base", OK, f"assigns with {module}")
    return Finding("--router base", LIMITED, "neither fairseq's libbase nor scipy", "pip install scipy")


def check_several_ranks() -> Finding:
    """The backends for expert parallelism."""
    if not dist.is_available():
        return Finding(
            "several ranks", LIMITED, "torch was built without torch.distributed", "install a torch with it; one rank works"
        )
    backends = [name for name, there in (("nccl", dist.is_nccl_available), ("gloo", dist.is_gloo_available)) if there()]
    return Finding("several ranks", OK if backends else LIMITED, ", ".join(backends) or "no backend")


def devices() -> List[str]:
    """The CPU, and every GPU."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def check_device(device: str, build: Callable = build_moe_layer) -> Finding:
    """Train a small layer on the device for one step."""
    try:
        layer = build("sparsemixer", model_dim=32, hidden_dim=64, num_experts=4).to(device)
        layer(torch.randn(16, 32, device=device)).sum().backward()
        finite = all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())
    except RuntimeError as error:
        return Finding(device, BROKEN, f"a layer does not train ({str(error).splitlines()[0]})", _device_remedy(device))
    if not finite:
        return Finding(device, BROKEN, "a layer's gradients are not finite", _device_remedy(device))
    return Finding(device, OK, f"{_describe(device)}: a layer trains")


def _describe(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    half = "bf16 and fp16" if torch.cuda.is_bf16_supported() else "fp16"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {half}"


def _device_remedy(device: str) -> str:
    return "reinstall torch" if device == "cpu" else "install a torch built for this GPU and driver, or train with --cpu"
