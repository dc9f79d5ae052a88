"""What this machine and installation can do: versions, devices, which fairseq it is, and a layer trained on each device."""

import platform
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Callable, List, Optional

import torch
from torch import distributed as dist

import fairseq_sparsemixer
from fairseq_sparsemixer.moe_layer import build_moe_layer

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
        check_registration(),
        *(check_package(name, remedy) for name, remedy in PACKAGES.items()),
        check_balanced_assignment(),
        check_several_ranks(),
        *(check_device(device) for device in devices()),
    ]


PACKAGES = {
    "fairscale": "pip install fairscale==0.4.13",
    "sacrebleu": "evaluation in BLEU will not work; pip install sacrebleu",
    "sentencepiece": "subword recipes will not work; pip install sentencepiece",
    "matplotlib": "plots will not work; pip install matplotlib",
}


def version(distribution: str) -> Optional[str]:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_torch() -> Finding:
    """torch, and what it was built for."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 4):
        return Finding("torch", BROKEN, f"{torch.__version__}, {built}", 'needs torch 2.4 or later: pip install "torch>=2.4,<3"')
    return Finding("torch", OK, f"{torch.__version__}, {built}")


def check_fairseq() -> Finding:
    """Which distribution the import package fairseq comes from, and whether it imports."""
    wanted = "fairseq-fixed==0.12.3.1" if sys.version_info >= (3, 11) else "fairseq==0.12.2"
    names = [f"{name} {version(name)}" for name in ("fairseq", "fairseq-fixed") if version(name)]
    if not names:
        return Finding("fairseq", LIMITED, "not installed: layers work, training does not", f"pip install {wanted}")
    if len(names) > 1:
        remedy = f"both install the same package; pip uninstall fairseq fairseq-fixed, then pip install {wanted}"
        return Finding("fairseq", BROKEN, " and ".join(names), remedy)
    try:
        import_module("fairseq.models")
    except Exception as error:  # whatever a fairseq of another Python or torch stumbles over
        return Finding("fairseq", BROKEN, f"{names[0]} does not import ({type(error).__name__})", f"pip install {wanted}")
    return Finding("fairseq", OK, names[0])


def check_registration() -> Finding:
    """Whether fairseq knows our models."""
    try:
        registry = import_module("fairseq.models").MODEL_REGISTRY
    except Exception:
        return Finding("models", LIMITED, "none, as fairseq does not import", "see fairseq above")
    models = [name for name in registry if name.endswith("_moe")]
    if not models:
        return Finding(
            "models", BROKEN, "none registered", "install fairseq first, then import fairseq_sparsemixer in a new process"
        )
    return Finding("models", OK, ", ".join(sorted(models)))


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
        except ImportError:
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
