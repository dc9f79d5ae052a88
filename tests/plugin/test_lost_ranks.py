"""lost_ranks.py: timeouts and error messages. tests/distributed and tests/sweeps test with real ranks."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from fairseq.distributed import utils
from ranks import free_port, run_ranks
from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin import lost_ranks
from fairseq_sparsemixer.plugin.lost_ranks import distributed_init, explaining_lost_ranks, timeout_of


def configuration(save_dir="run", world_size=2, **model):
    return SimpleNamespace(
        model=SimpleNamespace(**model),
        checkpoint=SimpleNamespace(save_dir=str(save_dir)),
        distributed_training=SimpleNamespace(distributed_world_size=world_size, distributed_rank=1),
    )


@pytest.mark.parametrize("seconds", [0, -3, 1e-9, 1e12, 1e300, float("nan"), float("inf"), -float("inf")])
def test_an_invalid_timeout_is_refused(seconds):
    with pytest.raises(
        ConfigurationError, match=f"--collective-timeout {seconds} must be a number of seconds between".replace("+", ".")
    ):
        timeout_of(configuration(collective_timeout=seconds))


def test_without_the_flag_torchs_timeout_is_used():
    assert timeout_of(configuration()) is None  # one of fairseq's own models
    assert timeout_of(configuration(collective_timeout=None)) is None
    assert timeout_of(configuration(collective_timeout=2.5)) == timedelta(seconds=2.5)


def timeouts_of_groups(seconds):
    """The timeouts of a rank's groups, if the default group exists already, as under fairseq-hydra-train."""
    lost_ranks.set_timeout(timedelta(seconds=seconds))
    groups = [dist.group.WORLD, utils.get_global_group(), utils.get_data_parallel_group()]
    return [group._get_backend(group._device_types[0]).options._timeout for group in groups]


@pytest.mark.distributed
def test_the_timeout_applies_to_the_groups_that_fairseq_creates():
    for found in run_ranks(2, timeouts_of_groups, 7):
        assert found == [timedelta(seconds=7)] * 3


def rendezvous_alone(meeting):
    cfg = SimpleNamespace(
        common=SimpleNamespace(tpu=False, model_parallel_size=1),
        distributed_training=SimpleNamespace(
            distributed_rank=0, distributed_world_size=2, distributed_backend="gloo", distributed_init_method=meeting
        ),
        model=SimpleNamespace(collective_timeout=1),
        checkpoint=SimpleNamespace(save_dir="nowhere"),
    )
    original = dist.init_process_group
    try:
        with explaining_lost_ranks(cfg):
            distributed_init(cfg)
    except ConfigurationError as error:
        return str(error), dist.init_process_group is original


@pytest.mark.distributed
@pytest.mark.parametrize("scheme", ["file", "tcp"])
def test_a_rank_alone_at_the_rendezvous_reports_it_after_the_timeout(scheme, tmp_path):
    meeting = f"file://{tmp_path}/ranks" if scheme == "file" else f"tcp://127.0.0.1:{free_port()}"
    ((sentence, restored),) = run_ranks(1, rendezvous_alone, meeting, group=False, deadline=60)
    assert sentence.startswith("fairseq-sparsemixer: rank 0 lost contact with another rank (")
    assert sentence.endswith("; restart the run") and "\n" not in sentence
    assert restored


@pytest.mark.parametrize("name", [None, "checkpoint_last.pt", "checkpoint_last-rank-0.pt"])
def test_the_checkpoint_to_resume_from_is_named_if_there_is_one(name, tmp_path):
    if name:
        (tmp_path / name).touch()
    with pytest.raises(ConfigurationError) as end:
        with explaining_lost_ranks(configuration(tmp_path)):
            raise RuntimeError("[pair.cc:1] Connection closed by peer [127.0.0.1]:1.\nmore")
    remedy = f"restart to resume from {tmp_path}/checkpoint_last.pt" if name else "restart the run"
    reason = "[pair.cc:1] Connection closed by peer [127.0.0.1]:1"
    assert end.value.message == f"rank 1 lost contact with another rank ({reason}); {remedy}"


@pytest.mark.parametrize(
    "words, world_size",
    [
        ("CUDA error: the launch timed out and was terminated", 2),
        ("DataLoader timed out after 3 seconds", 2),
        ("shapes cannot be multiplied", 2),
        ("Connection closed by peer", 1),
    ],
)
def test_other_errors_are_not_changed(words, world_size):
    with pytest.raises(RuntimeError, match=words):
        with explaining_lost_ranks(configuration(world_size=world_size)):
            raise RuntimeError(words)


def test_fairseq_uses_our_functions_to_start_ranks():
    assert utils.distributed_init is lost_ranks.distributed_init
    assert utils.distributed_main is lost_ranks.distributed_main
