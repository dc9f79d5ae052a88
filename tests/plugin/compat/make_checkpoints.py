"""Writes the checkpoints in this folder: `PYTHONPATH=. python tests/plugin/compat/make_checkpoints.py NAME` in a clone.

NAME stands for the installed fairseq: `stock` for 0.12.2, `fixed` for fairseq-fixed. Trains fairseq's own `transformer` without
this package (NAME-transformer.pt), then `transformer_moe` (NAME-transformer_moe.pt). NAME.json holds their outputs.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

SIZES = (
    "--encoder-embed-dim 8 --decoder-embed-dim 8 --encoder-ffn-embed-dim 8 --decoder-ffn-embed-dim 8 --share-all-embeddings"
    " --encoder-layers 1 --decoder-layers 1 --encoder-attention-heads 2 --decoder-attention-heads 2"
    " --dropout 0 --attention-dropout 0 --activation-dropout 0 --optimizer adam --lr 0.01 --batch-size 8 --seed 1 --cpu"
    " --num-workers 0 --disable-validation --no-epoch-checkpoints --max-update 2"
).split()
MODELS = {
    "transformer": "--arch transformer_tiny --criterion cross_entropy",
    "transformer_moe": "--arch transformer_moe_tiny --criterion moe_cross_entropy --router switch --num-experts 2 --jitter-eps 0",
}


def batch(words: Any) -> Dict[str, torch.Tensor]:
    """Two sentences, one of them padded."""
    source = torch.tensor([[5, 9, 12, 7, 2], [8, 6, 2, 1, 1]])
    previous = torch.tensor([[2, 6, 5, 11], [2, 9, 1, 1]])
    return {"src_tokens": source, "src_lengths": source.ne(words.pad()).sum(1), "prev_output_tokens": previous}


def outputs(checkpoint: Path, data: Path) -> torch.Tensor:
    """Log-probabilities [N, V] of non-padding words, from one forward in training mode (all dropout is 0)."""
    from fairseq import checkpoint_utils

    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides={"data": str(data)})
    inputs = batch(task.source_dictionary)
    with torch.no_grad():  # in training mode, because fairseq 0.12.2's own transformer fails under torch 2 in evaluation mode
        logits = model.train()(**inputs)[0]
    return logits[inputs["prev_output_tokens"].ne(task.source_dictionary.pad())].log_softmax(-1)


def anonymous(state: Dict[str, Any]) -> Dict[str, Any]:
    """The checkpoint without folder names of the machine that wrote it."""
    model = vars(state["cfg"]["model"])
    for group in (model, *(group for group in state["cfg"].values() if isinstance(group, dict))):
        group.update({name: None for name in ("user_dir", "save_dir", "data") if name in group})
    return state


def main(name: str) -> None:
    """Write the two checkpoints and their outputs."""
    import runs
    from fairseq import checkpoint_utils
    from fairseq_cli import train

    expected = {}
    with tempfile.TemporaryDirectory() as folder:
        data = runs.make_corpus(Path(folder))
        for model, flags in MODELS.items():
            if model != "transformer":
                import fairseq_sparsemixer  # noqa: F401
            checkpoint_utils.save_checkpoint.__dict__.pop("best", None)
            save_dir = Path(folder) / model
            runs.run(train.cli_main, data, "--save-dir", save_dir, *SIZES, *flags.split())
            state = torch.load(save_dir / "checkpoint_last.pt", weights_only=False)
            torch.save(anonymous(state), HERE / f"{name}-{model}.pt")
        for model in MODELS:
            found = outputs(HERE / f"{name}-{model}.pt", data)
            expected[model] = [[round(value, 7) for value in row] for row in found.tolist()]
    (HERE / f"{name}.json").write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
