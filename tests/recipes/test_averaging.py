"""Checkpoint averaging."""

import pytest
import torch

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.averaging import average_checkpoints, last_checkpoints


def save(path, value, dtype=torch.float32, **more):
    model = {"weight": torch.full((2,), value, dtype=dtype), "steps": torch.tensor([int(value)])}
    torch.save({"model": {**model, **more}, "cfg": {}, "last_optimizer_state": {"state": {0: {}}}}, path)
    return path


def test_the_last_checkpoints_are_chosen_by_update_number(tmp_path):
    for name in ("checkpoint_1_900.pt", "checkpoint_2_1000.pt", "checkpoint_2_1100.pt", "checkpoint_best.pt", "checkpoint2.pt"):
        save(tmp_path / name, 1)
    assert [path.name for path in last_checkpoints(tmp_path, 2)] == ["checkpoint_2_1000.pt", "checkpoint_2_1100.pt"]
    with pytest.raises(ConfigurationError, match="has no checkpoint_EPOCH_UPDATE.pt"):
        (tmp_path / "empty").mkdir()
        last_checkpoints(tmp_path / "empty", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_are_averaged_in_float32_and_counters_keep_the_last_value(tmp_path, dtype):
    values = (1.0, 2.0, 6.0)
    average_checkpoints([save(tmp_path / f"{value}.pt", value, dtype) for value in values], tmp_path / "average.pt")
    state = torch.load(tmp_path / "average.pt", weights_only=True)
    assert state["model"]["weight"].dtype == torch.float32 and state["model"]["weight"].tolist() == [3.0, 3.0]
    assert state["model"]["steps"].tolist() == [6] and state["last_optimizer_state"] is None
    assert torch.load(tmp_path / "1.0.pt", weights_only=True)["model"]["weight"].tolist() == [1.0, 1.0]  # unchanged


def test_checkpoints_of_different_models_are_refused(tmp_path):
    paths = [save(tmp_path / "a.pt", 1.0), save(tmp_path / "b.pt", 1.0, other=torch.zeros(1))]
    with pytest.raises(ConfigurationError, match="b.pt has a different model than .*a.pt"):
        average_checkpoints(paths, tmp_path / "average.pt")
