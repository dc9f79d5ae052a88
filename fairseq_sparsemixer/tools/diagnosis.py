"""Checks of this machine and installation: versions, the source of fairseq, a model run, a layer trained on each device."""

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
    """One line of the diagnosis. remedy: what to do; empty if there is no problem."""

    subject: str
    state: str
    found: str
    remedy: str = ""


def diagnose() -> List[Finding]:
    """Run all checks, the most basic first."""
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
    "sacrebleu": f"BLEU evaluation will not work; {remedy_for('tools')}",
    "sentencepiece": f"subword recipes will not work; {remedy_for('tools')}",
    "matplotlib": f"plots will not work; {remedy_for('tools')}",
}


def check_torch() -> Finding:
    """The version of torch, and whether it was built for CUDA."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 4):
        return Finding("torch", BROKEN, f"{torch.__version__}, {built}", 'needs torch 2.4 or later: pip install "torch>=2.4,<3"')
    return Finding("torch", OK, f"{torch.__version__}, {built}")


def check_fairseq() -> Finding:
    """Which distribution provides the package fairseq, and whether it imports."""
    names, spec, remedy = providers("fairseq"), find_spec("fairseq"), remedy_for("fairseq")
    if spec is None:
        return Finding("fairseq", LIMITED, "not installed: layers work, training does not", remedy)
    found = " and ".join(names) or f"in {spec.origin}, not from an installed distribution"
    if names:
        remedy = f"pip uninstall {' '.join(name.split()[0] for name in names)}, then {remedy}"
    if len(names) > 1:
        return Finding("fairseq", BROKEN, found, f"they overwrite each other's files; {remedy}")
    try:
        import_module("fairseq.models")
    except Exception as error:  # an incompatible fairseq can raise anything
        return Finding("fairseq", BROKEN, f"{found} does not import ({type(error).__name__})", remedy)
    return Finding("fairseq", OK, found)


def check_models() -> Finding:
    """Whether fairseq has our models, and can build and run them: a fairseq that imports may still be incompatible."""
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
            remedy = "this fairseq and this torch are incompatible; docs/support.md lists versions that work together"
            return Finding("models", BROKEN, f"transformer_moe with --router {router} does not run ({reason})", remedy)
    return Finding("models", OK, f"{', '.join(sorted(models))}: transformer_moe trains and runs")


def run_model(router: str) -> None:
    """Train a tiny transformer_moe on two sentences, one of them padded, and run it in evaluation mode.

    Raises any error of the model, and ArithmeticError if an output is not finite.
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
    """Whether a package is installed that some command or model needs."""
    found = version(name)
    if found is None:
        return Finding(name, BROKEN if name == "fairscale" else LIMITED, "not installed", remedy)
    return Finding(name, OK, found)


def check_balanced_assignment() -> Finding:
    """The solver of `--router base`'s balanced assignment."""
    for module in ("fairseq.libbase", "scipy.optimize"):
        try:
            import_module(module)
        except (ImportError, OSError):  # missing, or built against another torch
            continue
        return Finding("--router base", OK, f"assigns with {module}")
    return Finding("--router base", LIMITED, "neither fairseq's libbase nor scipy", "pip install scipy")


def check_several_ranks() -> Finding:
    """The available backends for expert parallelism."""
    if not dist.is_available():
        return Finding(
            "several ranks", LIMITED, "torch was built without torch.distributed", "install a torch with it; a single rank works"
        )
    backends = [name for name, there in (("nccl", dist.is_nccl_available), ("gloo", dist.is_gloo_available)) if there()]
    return Finding("several ranks", OK if backends else LIMITED, ", ".join(backends) or "no backend")


def devices() -> List[str]:
    """The CPU and all GPUs."""
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
