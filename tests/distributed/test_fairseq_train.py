"""fairseq-train on several ranks, with its Trainer, iterators and optimizers, compared with one process.

Two ranks process the batches that one process accumulates with `--update-freq 2`.
"""

import re
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List
from unittest.mock import patch

import pytest
import torch
from ranks import meeting_place, rank_number, run_ranks
from runs import EXPERTS, SMALL, make_corpus, run
from torch.nn.parallel import DistributedDataParallel

from fairseq_sparsemixer.cli.launch import rank_command
from fairseq_sparsemixer.moe.gates.step_state import StepState
from fairseq_sparsemixer.plugin.trainer import MoETrainer

pytestmark = pytest.mark.distributed

USER_DIR = Path(__file__).resolve().parent.parent.parent / "fairseq_sparsemixer"
FLAGS = [*(flag for flag in SMALL if flag != "--disable-validation"), *EXPERTS, "--required-batch-size-multiple", "1"]
ROUNDING_ALONE = "k_proj.bias"  # a key bias does not change attention: its gradient is rounding error, which Adam amplifies


def train(data: Path, world_size: int, meeting: str, rank: int, *flags: str) -> Dict[str, Any]:
    """Run fairseq-train on this rank; its norms, losses and parameters, or the error it ended with as `exit`."""
    import fairseq_cli.train
    from fairseq.logging import metrics

    trainers: List[MoETrainer] = []
    norms, losses, idle = [], [], []
    started, checked, validated, stepped = (
        MoETrainer.__init__, MoETrainer._check_grad_norms, MoETrainer.valid_step, MoETrainer.train_step,
    )  # fmt: skip

    def start(self, *args):
        started(self, *args)
        trainers.append(self)

    def check(self, norm):  # fairseq checks norms only on GPUs
        self._grad_norm_buf = torch.zeros(self.data_parallel_world_size, dtype=torch.double)
        if self.data_parallel_world_size > 1:
            checked(self, norm)
        norms.append(float(norm))

    def step(self, samples, *args):
        idle.append(all(len(sample) == 0 for sample in samples))
        output = stepped(self, samples, *args)
        losses.append(output and output["loss"])
        return output

    def validate(self, sample):
        output = validated(self, sample)
        losses.append(("valid", float(metrics.get_meter("valid", "loss").avg)))
        return output

    command = ["fairseq-train", str(data), "--user-dir", str(USER_DIR), *FLAGS, "--no-save", "--no-progress-bar", *flags]
    result: Dict[str, Any] = {"exit": None}
    on_cpu = patch(
        "fairseq.models.distributed_fairseq_model.DistributedDataParallel", partial(_without_device, DistributedDataParallel)
    )
    watch = patch.multiple(MoETrainer, __init__=start, _check_grad_norms=check, valid_step=validate, train_step=step)
    with on_cpu, watch:
        try:
            run(fairseq_cli.train.cli_main, *rank_command(command, rank, world_size, meeting)[1:])
        except SystemExit as end:
            return {"exit": str(end)}
    (trainer,) = trainers
    assert trainer.expert_group is None or trainer.data_parallel_world_size > 1
    result.update(
        early=trainer.early is not None,
        norms=norms,
        losses=losses,
        idle=idle,
        parameters=parameters(trainer.get_model(), trainer.expert_group),
    )
    if trainer.cfg.ema.store_ema:
        result["ema"] = parameters(trainer.ema.get_model(), trainer.expert_group)
    return result


def _without_device(wrapper: Any, device_ids: Any, output_device: Any, **options: Any) -> Any:
    return wrapper(**options)  # fairseq passes the number of a GPU


def parameters(model: torch.nn.Module, ranks: Any) -> Dict[str, Any]:
    """{name: (index in the expert group, or None for parameters that are not experts; tensor)}, including gate states."""
    local = None if ranks is None else ranks.index
    gates = ((name, module) for name, module in model.named_modules() if isinstance(module, StepState))
    states = ((f"{name}.{part}", buffer) for name, module in gates for part, buffer in module.named_buffers())
    return {
        name: (local if ".experts." in name else None, parameter.detach().float().clone())
        for name, parameter in chain(model.named_parameters(), states)
    }


def train_rank(data: Path, world_size: int, meeting: str, flags: List[str]) -> Dict[str, Any]:
    return train(data, world_size, meeting, rank_number(), *flags)


def runs(data: Path, world_size: int, *flags: str) -> List[Dict[str, Any]]:
    return run_ranks(world_size, train_rank, data, world_size, meeting_place(), list(flags), group=False)


def whole(results: List[Dict[str, Any]], kind: str = "parameters") -> Dict[str, torch.Tensor]:
    """All parameters, with experts concatenated over the ranks of the first group."""
    tensors = {}
    for name, (index, tensor) in results[0][kind].items():
        shares = {result[kind][name][0]: result[kind][name][1] for result in results}
        tensors[name] = tensor if index is None else torch.cat([shares[place] for place in sorted(shares)])
    return tensors


def assert_same(found: Dict[str, Any], expected: Dict[str, Any], tolerance: float = 5e-5, least: float = 1e-7) -> None:
    """Looser than test_equivalence, which compares gradients: Adam amplifies the rounding error of small ones."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(ROUNDING_ALONE):
            continue
        assert tensor.shape == found[name].shape, name
        difference = (found[name] - tensor).abs().max()
        assert difference <= tolerance * tensor.abs().max() + least, f"{name}: {difference}"


@pytest.fixture(scope="module")
def five_batches(tmp_path_factory) -> Path:
    """20 sentences: 5 batches of 4, so that in the last update the second of two ranks has no batch."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), sentences=20)


@pytest.fixture(scope="module")
def one_process(five_batches) -> Dict[str, Any]:
    """The reference of most tests: six updates with two batches each."""
    return runs(five_batches, 1, "--update-freq", "2", "--max-update", "6", "--batch-size-valid", "3")[0]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--expert-parallel-size", "1"],
        ["--checkpoint-activations", "--record-a2a-perf-stats"],
        ["--checkpoint-experts", "--ddp-backend", "pytorch_ddp"],
        ["--amp"],
        ["--moe-overlap", "3", "--checkpoint-activations"],
    ],
    ids=lambda flags: flags[0] if flags else "plain",
)
def test_two_ranks_equal_one_process(flags, five_batches, one_process):
    results = runs(five_batches, 2, "--max-update", "6", "--batch-size-valid", "3", *flags)
    assert results[0]["norms"] == results[1]["norms"]
    assert results[0]["norms"] == pytest.approx(one_process["norms"], rel=1e-5)
    assert_same(whole(results), whole([one_process]))
    assert results[0]["idle"] == [False] * 6 and results[1]["idle"] == [False, False, True] * 2
    valid = [loss[1] for loss in results[0]["losses"] if isinstance(loss, tuple)]
    expected = [loss[1] for loss in one_process["losses"] if isinstance(loss, tuple)]
    assert valid[-1] == pytest.approx(expected[-1], rel=1e-5)


def test_gradient_accumulation_and_ema_on_two_ranks(five_batches):
    flags = "--max-update 4 --store-ema --ema-decay 0.5 --clip-norm 0.1 --disable-validation".split()
    alone = runs(five_batches, 1, *flags, "--update-freq", "4")
    both = runs(five_batches, 2, *flags, "--update-freq", "2")
    assert_same(whole(both), whole(alone))
    assert_same(whole(both, "ema"), whole(alone, "ema"))


@pytest.mark.parametrize(
    "flags",
    [[], ["--expert-parallel-size", "1", "--ddp-backend", "pytorch_ddp"], ["--balance-scope", "update"]],
    ids=["experts on two ranks", "replicas", "update"],
)
def test_a_rank_whose_batches_end_within_an_update_counts(flags, tmp_path):
    """Of 7 batches, the second rank has 3, for two updates of 2; fairseq alone forgets the number of words in its third."""
    data, flags = make_corpus(tmp_path, sentences=28), ["--max-update", "4", "--disable-validation", *flags]
    both, alone = runs(data, 2, *flags, "--update-freq", "2"), runs(data, 1, *flags, "--update-freq", "4")[0]
    assert both[0]["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert both[0]["losses"] == pytest.approx(alone["losses"], abs=2e-3)
    assert_same(whole(both), whole([alone]))


def test_four_ranks_with_replicas_equal_one_process(five_batches):
    flags = "--max-update 4 --num-experts 2 --disable-validation".split()
    alone = runs(five_batches, 1, *flags, "--update-freq", "4")
    assert_same(whole(runs(five_batches, 4, *flags)), whole(alone))


@pytest.mark.parametrize("backend, flags", [("legacy_ddp", ""), ("pytorch_ddp", "--moe-overlap 2 --capacity-factor 2.0")])
def test_two_nodes_of_two_ranks_equal_one_process(backend, flags, five_batches):
    """In every second update, three of the four ranks have no batch."""
    common = ["--max-update", "4", "--disable-validation", "--clip-norm", "0.1", *flags.split()]
    alone = runs(five_batches, 1, *common, "--update-freq", "4")
    four = runs(five_batches, 4, *common, "--moe-hierarchical-exchange", "2", "--ddp-backend", backend)
    assert [len(result["idle"]) for result in four] == [4] * 4 and four[3]["idle"] == [False, True] * 2
    assert_same(whole(four), whole(alone))


def test_nodes_that_do_not_divide_the_ranks_of_a_group_are_refused(five_batches):
    for result in runs(five_batches, 2, "--moe-hierarchical-exchange", "3"):
        assert "--moe-hierarchical-exchange 3 does not divide the 2 ranks that share the experts; leave it out" in result["exit"]


@pytest.mark.parametrize(
    "flags, batches, early",
    [
        ("", 1, True),
        ("--update-freq 2", 2, True),
        ("--checkpoint-activations", 1, False),
        ("--ddp-backend legacy_ddp", 1, False),
    ],
)
def test_replicas_reduced_during_backward_equal_one_process(flags, batches, early, five_batches):
    """With two batches per rank, an epoch is one update, and in its second half three of the four ranks have no batch."""
    common = "--max-update 2 --num-experts 2 --disable-validation --clip-norm 0.1".split()
    alone = runs(five_batches, 1, *common, "--update-freq", str(4 * batches))
    four = runs(five_batches, 4, *common, "--ddp-backend", "pytorch_ddp", *flags.split())
    assert [result["early"] for result in four] == [early] * 4
    assert_same(whole(four), whole(alone))


@pytest.mark.parametrize("flags", [["--capacity-factor", "1.0"], ["--moe-bias-update-rate", "0.1"]], ids=lambda flags: flags[0])
def test_capacity_and_selection_bias_are_the_same_on_two_ranks(flags, five_batches):
    flags = ["--max-update", "4", "--disable-validation", *flags]
    alone = runs(five_batches, 1, *flags, "--update-freq", "2")
    assert_same(whole(runs(five_batches, 2, *flags)), whole(alone))
    biases = [tensor for name, tensor in whole(alone).items() if name.endswith("balancer.bias")]
    assert any(bias.any() for bias in biases) == ("--moe-bias-update-rate" in flags)


def test_layers_with_different_numbers_of_experts_equal_one_process(five_batches):
    flags = ["--max-update", "4", "--encoder-moe-layers", "0:2,1:6", "--decoder-moe-layers", "last:1"]
    alone = whole(runs(five_batches, 1, *flags, "--update-freq", "2"))
    assert sorted({len(tensor) for name, tensor in alone.items() if name.endswith("weight_in")}) == [2, 4, 6]
    both = runs(five_batches, 2, *flags)
    assert_same(whole(both), alone)
    assert all(len(tensor) in (1, 2, 3) for name, (_, tensor) in both[0]["parameters"].items() if name.endswith("weight_in"))


ONLY_EXPERTS = r"^(?!.*\.experts\.)"  # all other names


@pytest.fixture(scope="module")
def untrained(five_batches) -> Dict[str, torch.Tensor]:
    return whole(runs(five_batches, 1, "--max-update", "1", "--lr", "0", "--disable-validation"))


@pytest.mark.parametrize(
    "frozen, backend",
    [(r"\.gate\.", "pytorch_ddp"), (r"\.experts\.,^encoder,encoder_attn", "pytorch_ddp"), (ONLY_EXPERTS, "legacy_ddp")],
)
def test_frozen_parameters_stay_and_the_others_equal_one_process(frozen, backend, five_batches, untrained):
    flags = ["--max-update", "2", "--disable-validation", "--clip-norm", "0.1", "--freeze", frozen]
    alone = runs(five_batches, 1, *flags, "--update-freq", "2")[0]
    both = runs(five_batches, 2, *flags, "--ddp-backend", backend)
    assert both[0]["norms"] == both[1]["norms"]
    assert both[0]["norms"] == pytest.approx(alone["norms"], rel=1e-5) and min(alone["norms"]) > 0.1
    found = whole(both)
    assert_same(found, whole([alone]))
    for name, tensor in found.items():
        assert torch.equal(tensor, untrained[name]) == any(re.search(pattern, name) for pattern in frozen.split(",")), name


def test_adapters_of_experts_equal_one_process(five_batches):
    flags = ["--max-update", "3", "--disable-validation", "--clip-norm", "0.1", "--expert-lora-rank", "2", "--checkpoint-experts"]
    alone = runs(five_batches, 1, *flags, "--update-freq", "2")[0]
    both = runs(five_batches, 2, *flags, "--ddp-backend", "pytorch_ddp")
    assert both[0]["norms"] == both[1]["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    found = whole(both)
    assert_same(found, whole([alone]))
    changed = [name for name, tensor in found.items() if name.endswith("_b") and tensor.any()]  # zero at first
    assert len(changed) == 6 and all(".experts.lora_" in name and len(found[name]) == 4 for name in changed)


STATES = {  # of a router's gate: flags, the end of the state's name, its value before training
    "default_moe": ("--router-option default_decay=0.5", ".average.vectors", 0.0),
    "expert_threshold": ("--router-option threshold_decay=0.5,warmup_updates=2", ".threshold.value", 0.0),
    "remoe": ("--router-option l1_coefficient=0.01", ".l1.value", 0.01),
}


@pytest.mark.parametrize("shared", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize("router", sorted(STATES))
def test_the_states_of_gates_are_the_same_on_two_ranks(router, shared, five_batches):
    options, state, initial = STATES[router]
    flags = ["--max-update", "4", "--disable-validation", "--router", router, "--jitter-eps", "0.1", *options.split()]
    alone = whole(runs(five_batches, 1, *flags, "--update-freq", "2"))
    both = runs(five_batches, 2, *flags, *(() if shared else ("--expert-parallel-size", "1")))
    assert_same(whole(both), alone)
    values = [tensor for name, tensor in alone.items() if name.endswith(state)]
    assert len(values) == 3 and all((value != initial).any() for value in values)
    for name, (_, tensor) in both[0]["parameters"].items():
        if name.endswith(state):
            assert torch.equal(tensor, both[1]["parameters"][name][1])


def test_the_global_balance_loss_is_that_of_the_whole_batch(tmp_path):
    data = make_corpus(tmp_path, sentences=8)
    flags = "--max-update 3 --moe-balance-loss-weight 1.0 --disable-validation --store-ema --ema-decay 0.5".split()
    alone = runs(data, 1, *flags, "--batch-size", "8")
    both = runs(data, 2, *flags, "--batch-size", "4", "--balance-scope", "global")
    assert_same(whole(both), whole(alone))
    assert_same(whole(both, "ema"), whole(alone, "ema"))
    local = runs(data, 2, *flags, "--batch-size", "4")
    with pytest.raises(AssertionError):
        assert_same(whole(local), whole(alone))


@pytest.mark.parametrize(
    "ranks, sentences, flags",
    [
        (1, 8, "--update-freq 4"),
        (1, 7, "--update-freq 4 --checkpoint-activations"),
        (2, 8, "--update-freq 2"),
        (2, 7, "--update-freq 2 --checkpoint-activations"),
        (2, 5, "--update-freq 2 --expert-parallel-size 1"),  # 2 + 2 sentences, and 1 + none
        (2, 4, "--update-freq 1"),
    ],
)
def test_the_balance_loss_of_an_update_is_that_of_its_whole_batch(ranks, sentences, flags, tmp_path):
    data = make_corpus(tmp_path, sentences=sentences)
    common = "--max-update 3 --moe-balance-loss-weight 1.0 --disable-validation".split()
    alone = runs(data, 1, *common, "--batch-size", str(sentences))
    split = runs(data, ranks, *common, "--batch-size", "2", "--balance-scope", "update", *flags.split())
    assert_same(whole(split), whole(alone))


@pytest.mark.parametrize("flags", [["--fp16"], ["--memory-efficient-fp16"]], ids=lambda flags: flags[0])
def test_the_gradient_norm_in_half_precision_is_the_same_on_all_ranks(flags, five_batches, one_process):
    results = runs(five_batches, 2, "--max-update", "3", "--disable-validation", "--fp16-init-scale", "4", *flags)
    assert results[0]["norms"] == results[1]["norms"]
    assert results[0]["norms"] == pytest.approx(one_process["norms"][:3], rel=0.05)


def overflowing_rank(data: Path, meeting: str, flag: str) -> Dict[str, Any]:
    """Train a rank; at the second update, an expert of rank 1 has an infinite gradient."""
    clip = MoETrainer.clip_grad_norm
    scales = []

    def overflow(self, clip_norm):
        if len(scales) == 1 and self.data_parallel_rank == 1:
            next(p for p in self.get_model().parameters() if hasattr(p, "expert")).grad.flatten()[0] = float("inf")
        scales.append(self.optimizer.scaler.loss_scale)
        return clip(self, clip_norm)

    with patch.object(MoETrainer, "clip_grad_norm", overflow), patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        flags = flag, "--max-update", "3", "--disable-validation", "--fp16-init-scale", "4"
        result = train(data, 2, meeting, rank_number(), *flags)
    return {**result, "scales": scales}


@pytest.mark.parametrize("flag", ["--fp16", "--memory-efficient-fp16"])
def test_all_ranks_skip_an_update_that_overflows_on_one_rank(flag, five_batches):
    results = run_ranks(2, overflowing_rank, five_batches, meeting_place(), flag, group=False)
    assert results[0]["scales"] == results[1]["scales"] == [4.0, 4.0, 2.0, 2.0]
    assert results[0]["norms"] == results[1]["norms"] and len(results[0]["norms"]) == 3


@pytest.mark.parametrize("router", ["sparsemixer", "sparsemixer_v2"])
def test_sampling_routers_never_deadlock(router, five_batches):
    flags = "--max-update 5 --validate-interval-updates 2 --batch-size-valid 3".split()  # an epoch is 3 updates
    results = runs(five_batches, 2, "--router", router, *flags)
    assert results[0]["norms"] == results[1]["norms"]


@pytest.mark.parametrize(  # tests/plugin/test_trainer.py has all errors
    "flags, sentence",
    [
        (["--expert-parallel-size", "3"], "--num-experts 4 cannot be split over --expert-parallel-size 3"),
        (["--zero-sharding", "os"], "--zero-sharding os assigns"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_invalid_parallel_settings_are_refused_before_training(flags, sentence, five_batches):
    for result in runs(five_batches, 2, *flags):
        assert sentence in result["exit"]
