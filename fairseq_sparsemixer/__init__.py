"""fairseq-sparsemixer: Mixture-of-Experts training in fairseq. This folder is both the package and the `--user-dir`.

Four packages, each importing only the ones before it: moe (layers and routers, on torch and fairscale only), plugin (the
fairseq integration, with criterions), tools (studies, fidelity, plots, inspection) and cli (one module per command).
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, List, Optional

__version__ = "0.1.0"

_REPOSITORY = Path(__file__).resolve().parent.parent
if not Path(__file__).with_name("criterions").is_dir() and (_REPOSITORY / "criterions" / "__init__.py").is_file():
    # in a clone, criterions/ is beside this folder; importing it by name could pick up another, installed clone
    __path__.append(str(_REPOSITORY))

_HOME = {  # public name -> module, imported on first access because torch takes seconds to load
    "ESTIMATORS": "moe.estimators",
    "Gate": "moe.gates",
    "MoELayer": "moe.layer",
    "Routing": "moe.gates",
    "build_gate": "moe.gates",
    "build_moe_layer": "moe.layer",
    "form_expert_group": "moe.parallel",
    "reduce_expert_gradients": "moe.gradients",
    "register_gate": "moe.gates",
    "shard_experts": "moe.layer",
    "spread_experts": "moe.layer",  # the former name
}
__all__ = [*_HOME, "register"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Register models, criterions and trainer with fairseq, as `--user-dir` does. Needs fairseq; idempotent."""
    import_module(f"{__name__}.plugin.registration").register()


class _WaitForFairseq(MetaPathFinder):
    """Registers once fairseq is imported, so that the order of the two imports does not matter."""

    def find_spec(self, name: str, path: Any = None, target: Optional[ModuleType] = None) -> Optional[ModuleSpec]:
        """See MetaPathFinder. None for every other module."""
        spec = PathFinder.find_spec(name, path, target) if name == "fairseq" else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # fairscale uses deprecated torch.cuda.amp names
                execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if sys.modules.get("fairseq") is not None:  # as under --user-dir
    register()
else:
    sys.meta_path.insert(0, _WaitForFairseq())
