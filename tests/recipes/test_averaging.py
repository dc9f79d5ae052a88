"""The choice of a run's last checkpoints."""

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.averaging import last_checkpoints


def test_the_last_checkpoints_are_chosen_by_update_number(tmp_path):
    for name in ("checkpoint_1_900.pt", "checkpoint_2_1000.pt", "checkpoint_2_1100.pt", "checkpoint_best.pt", "checkpoint2.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in last_checkpoints(tmp_path, 2)] == ["checkpoint_2_1000.pt", "checkpoint_2_1100.pt"]
    with pytest.raises(ConfigurationError, match="has no checkpoint_EPOCH_UPDATE.pt"):
        (tmp_path / "empty").mkdir()
        last_checkpoints(tmp_path / "empty", 2)
