"""expert_shards.py: the experts of a model over ranks, and warnings of flags that change nothing."""

import logging
from types import SimpleNamespace
from typing import Any, List, Optional, Tuple

import pytest
from torch import distributed as dist
from torch import nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import build_moe_layer
from fairseq_sparsemixer.plugin import expert_shards
from fairseq_sparsemixer.plugin.expert_shards import share_out_experts
from tests.ranks import run_ranks

UNUSED_SLICES = "--shard-expert-optimizer changes nothing: each expert is on one rank only"


def configuration(optimizer: str, **model: Any) -> SimpleNamespace:
    return SimpleNamespace(
        distributed_training=SimpleNamespace(ddp_backend="legacy_ddp", zero_sharding="none"),
        optimization=SimpleNamespace(use_bmuf=False),
        model=SimpleNamespace(expert_parallel_size=None, **model),
        common=SimpleNamespace(tpu=False),
        task=SimpleNamespace(),
        optimizer=SimpleNamespace(_name=optimizer),
    )


@pytest.mark.parametrize("given, warned", [(True, [UNUSED_SLICES]), (False, [])])
def test_slices_on_one_rank_change_nothing_with_a_warning(given, warned, caplog):
    cfg = configuration("adafactor", shard_expert_optimizer=given)
    assert share_out_experts(cfg, None, build_moe_layer("switch", 4, 6, 2), None) is None
    assert [record.getMessage() for record in caplog.records] == warned


def test_layers_with_their_own_numbers_that_cannot_be_split_are_named():
    cfg = configuration("adam", num_experts=8)
    cfg.model.expert_parallel_size = 4
    model = nn.ModuleList([build_moe_layer("switch", 4, 6, count) for count in (2, 6)])
    with pytest.raises(
        ConfigurationError, match="cannot be split over --expert-parallel-size 4; .*; layers have 2, 6 experts by"
    ):
        share_out_experts(cfg, None, model, None)


def shared_out(ranks_per_node: Optional[int]) -> Tuple[int, bool, List[str]]:
    """On this rank: experts held, whether the exchange has two steps, and the warnings."""
    warnings: List[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    expert_shards.logger.addHandler(handler)
    layer = build_moe_layer("switch", 4, 6, 4)
    group = share_out_experts(configuration("adam", moe_hierarchical_exchange=ranks_per_node), SimpleNamespace(), layer, None)
    assert group.size == dist.get_world_size()
    return layer.num_local_experts, group.nodes is not None, warnings


@pytest.mark.distributed
@pytest.mark.parametrize(
    "size, ranks_per_node, two_steps, warns",
    [(4, 2, True, False), (2, None, False, False), (2, 1, False, True), (2, 2, False, True), (2, 4, False, True)],
)
def test_two_steps_without_several_nodes_of_several_ranks_change_nothing_with_a_warning(size, ranks_per_node, two_steps, warns):
    warning = (
        f"--moe-hierarchical-exchange {ranks_per_node} changes nothing:"
        f" it needs several nodes with several ranks of each group of {size}"
    )
    for found in run_ranks(size, shared_out, ranks_per_node):
        assert found == (4 // size, two_steps, [warning] if warns else [])
