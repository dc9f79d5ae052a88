"""Checkpoints written by earlier versions of this package still work.

before/ holds one from commit fc9b727, with its outputs: SparseMixer, two experts, capacity, selection bias, two updates.
"""

import json
from pathlib import Path

import pytest
import runs
import torch
from fairseq import checkpoint_utils

HERE = Path(__file__).parent
CHECKPOINT = HERE / "before" / "sparsemixer.pt"
FLAGS = (
    "--encoder-embed-dim 8 --decoder-embed-dim 8 --encoder-ffn-embed-dim 8 --decoder-ffn-embed-dim 8 --share-all-embeddings"
    " --encoder-layers 1 --decoder-layers 1 --encoder-attention-heads 2 --decoder-attention-heads 2 --dropout 0"
    " --router sparsemixer --num-experts 2 --moe-bias-update-rate 0.01 --capacity-factor 2"
).split()


def test_an_earlier_checkpoint_gives_the_same_outputs(corpus):
    overrides = {"data": str(corpus)}
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(CHECKPOINT)], arg_overrides=overrides)
    source = torch.tensor([[5, 9, 12, 7, 2], [8, 6, 2, 1, 1]])
    previous = torch.tensor([[2, 6, 5, 11], [2, 9, 1, 1]])
    with torch.no_grad():
        logits = model.eval()(source, source.ne(1).sum(1), previous)[0]
    found = logits[previous.ne(task.source_dictionary.pad())].log_softmax(-1)
    expected = torch.tensor(json.loads(CHECKPOINT.with_suffix(".json").read_text(encoding="utf-8")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_training_resumes_from_an_earlier_checkpoint(corpus, tmp_path):
    assert len(runs.train(corpus, tmp_path, *FLAGS, "--restore-file", CHECKPOINT, updates=4)) == 2
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    assert state["optimizer_history"][-1]["num_updates"] == 4
