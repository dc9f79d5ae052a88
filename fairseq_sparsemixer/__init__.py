"""fairseq-sparsemixer: Mixture-of-Experts training in fairseq. This folder is both the package and the `--user-dir`."""

import warnings
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

_REPOSITORY = Path(__file__).resolve().parent.parent
if not Path(__file__).with_name("criterions").is_dir() and (_REPOSITORY / "criterions" / "__init__.py").is_file():
    # in a clone, criterions/ stands beside this folder; asked for by name, another clone's might come that is installed
    __path__.append(str(_REPOSITORY))

from fairseq_sparsemixer.gates import Routing, build_gate  # noqa: E402
from fairseq_sparsemixer.moe_layer import MoELayer, build_moe_layer  # noqa: E402
from fairseq_sparsemixer.root_logger import root_logger_untouched  # noqa: E402

if find_spec("fairseq") is not None:
    with root_logger_untouched(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # fairscale, as fairseq loads it, spells torch.cuda.amp's old names
        from fairseq_sparsemixer import bfloat16, checkpoints, compatibility, criterions, lost_ranks, models, trainer  # noqa: E402,F401

    checkpoints.install()
    compatibility.restore_numpy_long()
    compatibility.look_for_nans_forward_only()
    bfloat16.install()
    lost_ranks.install()
    trainer.install()

__all__ = ["MoELayer", "Routing", "build_gate", "build_moe_layer"]
