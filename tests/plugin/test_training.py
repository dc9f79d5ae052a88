"""From the command line to a translation: fairseq-train, its checkpoints and log, and fairseq-generate."""

import argparse
import gzip
import json
import math
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import torch
from fairseq.data.data_utils import batch_by_size
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLosses
from runs import initialised

from fairseq_sparsemixer import __file__ as package
from fairseq_sparsemixer.moe.layer import MoELayer
from fairseq_sparsemixer.plugin import bfloat16

USER_DIR = package.rsplit("/", 1)[0]


@pytest.fixture
def exact_losses(monkeypatch):
    """The loss of every training batch from now on, in full precision, because fairseq's log rounds."""
    losses, forward = [], AuxiliaryLosses.forward

    def recorded(self, model, sample, reduce=True):
        result = forward(self, model, sample, reduce)
        if model.training:
            losses.append(result[0].item())
        return result

    monkeypatch.setattr(AuxiliaryLosses, "forward", recorded)
    return losses


def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(train, exact_losses, tmp_path):
    """fairseq does not save a random state, because it seeds every update with --seed + its number."""
    flags = ("--dropout", "0.1", "--save-interval-updates", "3")
    train(*flags, "--max-update", "6", "--save-dir", tmp_path / "whole")
    whole = list(exact_losses)
    exact_losses.clear()
    train(*flags, "--max-update", "3", "--save-dir", tmp_path / "parts")
    torch.manual_seed(12345)  # another random state, as in another process
    train(*flags, "--max-update", "6", "--save-dir", tmp_path / "parts")
    assert len(whole) == 6 and exact_losses == whole
    states = [torch.load(tmp_path / folder / "checkpoint_last.pt")["model"] for folder in ("whole", "parts")]
    assert all(torch.equal(states[1][name], value) for name, value in initialised(states[0]).items())


@pytest.mark.parametrize("stop", [5, 6], ids=["in the second epoch", "at its end"])
def test_a_run_resumed_in_a_later_epoch_sees_the_same_batches(stop, train, exact_losses, tmp_path):
    flags = ("--batch-size", "16", "--max-tokens", "1000")  # three updates an epoch
    train(*flags, "--max-update", "9", "--save-dir", tmp_path / "whole")
    whole = list(exact_losses)
    exact_losses.clear()
    for updates in (stop, 9):
        train(*flags, "--max-update", updates, "--save-dir", tmp_path / "parts")
    assert len(whole) == 9 and exact_losses == whole


@pytest.mark.slow
def test_a_checkpoint_generates_in_a_new_process(train, tmp_path, translation_data):
    train("--max-update", "2", "--no-progress-bar")
    command = ["-m", "fairseq_cli.generate", translation_data, "--path", tmp_path / "run" / "checkpoint_last.pt", "--cpu",
               "--user-dir", USER_DIR, "--gen-subset", "valid", "--beam", "2", "--max-len-b", "10"]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("H-") for line in done.stdout.splitlines()) == 8


def test_a_checkpoint_holds_only_tensors_plain_values_and_the_arguments(train, tmp_path):
    """weights_only can read it: besides plain containers, the only class is argparse.Namespace."""
    train("--max-update", "1", "--store-ema")
    path = tmp_path / "run" / "checkpoint_last.pt"
    assert "cfg" in torch.load(path, weights_only=True)
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(pickle.UnpicklingError, match="argparse.Namespace"):
            torch.load(path, weights_only=True)
        torch.serialization.add_safe_globals([argparse.Namespace])
        torch.load(path, weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


@pytest.mark.slow
def test_hydra_training_in_bf16_works_and_its_checkpoint_needs_no_allow_list(translation_data, tmp_path):
    """fairseq composes the configuration before it imports the user-dir, so our names are plain values, not groups."""
    small = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in
             (("embed_dim", 16), ("ffn_embed_dim", 32), ("attention_heads", 2), ("layers", 2))}  # fmt: skip
    regularisers = dict(moe_eom=0.1, moe_fom=0.1, moe_gating_dropout=0.1, moe_cmr=True, moe_cmr_gate_dropout=0.1)
    config = {
        "common": {"user_dir": USER_DIR, "cpu": True, "bf16": True},
        "task": {"_name": "translation", "data": str(translation_data)},
        "criterion": {"_name": "moe_cross_entropy", "moe_cmr_budget": 0.7, "moe_cmr_loss_weight": 0.2},
        "model": {"_name": "transformer_moe", "num_experts": 4, **small, **regularisers},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "fixed"},
        "optimization": {"lr": [0.01], "max_update": 2},
        "dataset": {"max_tokens": 100, "num_workers": 0},
        "checkpoint": {"save_dir": str(tmp_path)},
        "hydra": {"run": {"dir": str(tmp_path)}},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is valid YAML
    command = [sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(tmp_path), "--config-name", "run"]
    command.append(f"++common.moe_trace={tmp_path / 'trace.jsonl'}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)
    assert state["cfg"]["model"]["num_experts"] == 4
    assert '"layer": "encoder.layers.0"' in (tmp_path / "trace.jsonl").read_text()
    assert state["model"]["encoder.layers.0.fc1.moe.experts.weight_in"].shape == (4, 16, 32)
    assert state["model"]["encoder.layers.0.fc1.moe.cmr.shared.weight_in"].shape == (1, 16, 32)
    assert {name: state["cfg"]["model"][name] for name in regularisers} == regularisers


class RunsCode:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_malicious_checkpoint_is_refused_and_runs_no_code(train, tmp_path):
    torch.save({"model": {}, "cfg": RunsCode(tmp_path / "executed")}, tmp_path / "bad.pt")
    with pytest.raises(SystemExit):
        train("--max-update", "1", "--restore-file", tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("flags, message", [
    (("--router", "sparsmixer"), "--router sparsmixer is unknown; choose from dense, .*switch"),
    (("--num-experts", "0"), "--num-experts 0 must be at least 1"),
    (("--moe-top-k", "5", "--router", "sparsemixer_v2"), "--moe-top-k 5 must lie between 1 and --num-experts 4"),
    (("--moe-freq", "0"), "--moe-freq 0 must be at least 1"),
    (("--jitter-eps", "-0.5"), "--jitter-eps -0.5 must be at least 0"),
    (("--moe-balance-loss-weight", "-1"), "--moe-balance-loss-weight -1.0 must be at least 0"),
    (("--moe-load-file", "/proc/none/load"), "--moe-load-file /proc/none/load cannot be written"),
])  # fmt: skip
def test_bad_flags_give_a_one_line_error_before_training(train, caplog, flags, message):
    with pytest.raises(SystemExit, match="^fairseq-sparsemixer: " + message) as caught:
        train("--max-update", "1", "--no-save", *flags)
    assert "\n" not in caught.value.code  # a string: Python prints it and exits with status 1, without a traceback
    assert "Start iterating over samples" not in caplog.messages


def test_a_checkpoint_with_other_flags_gives_a_one_line_error(train):
    train("--max-update", "1")
    for flags, message in (
        (("--num-experts", "2"), "--num-experts 2 does not match"),
        (("--router", "switch"), "give the --router"),
    ):
        with pytest.raises(SystemExit, match=message):
            train("--max-update", "2", *flags)


def test_fairseq_traces_a_nan_gradient_to_its_module(train, caplog):
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        train("--max-update", "20", "--lr", "1e30", "--disable-validation")
    assert "detected in output of" in caplog.text


@pytest.mark.parametrize("flags", [("--tpu",), ("--tpu", "--bf16")])
def test_a_missing_tpu_is_refused(train, flags):
    with pytest.raises(SystemExit, match="--tpu needs torch_xla, which is not installed"):
        train("--max-update", "1", "--no-save", *flags)


@pytest.mark.parametrize("flags, installed, tpu", [
    (["--bf16"], False, False), (["--memory-efficient-bf16"], False, False), (["--bf16", "--tpu"], False, True),
    (["--tpu"], False, True), (["--bf16"], True, True), ([], False, False),
])  # fmt: skip
def test_bf16_uses_a_tpu_only_if_torch_xla_is_installed_or_tpu_is_given(translation_data, monkeypatch, flags, installed, tpu):
    from fairseq import options

    monkeypatch.setattr(bfloat16, "find_spec", lambda name: installed or None)
    parser, arch = options.get_training_parser(), ("--arch", "transformer_moe_tiny")
    args = options.parse_args_and_arch(parser, [str(translation_data), "--user-dir", USER_DIR, *arch, *flags])
    assert (args.tpu, args.bf16) == (tpu, any("bf16" in flag for flag in flags))


def test_a_subset_that_this_fairseq_drops_entirely_is_named_with_the_remedy(train):
    """The subset has 8 sentences."""
    if batch_by_size([0, 1], lambda index: 1, max_sentences=2, required_batch_size_multiple=8):
        pytest.skip("this fairseq keeps a last batch of any size")
    with pytest.raises(SystemExit, match="the subset valid has no batch left: .*-multiple 1000, .* give --required"):
        train("--max-update", "1", "--no-save", "--required-batch-size-multiple", "1000", "--train-subset", "valid")


def test_a_criterion_that_ignores_the_auxiliary_loss_gives_a_warning(train, caplog):
    train("--max-update", "1", "--no-save", "--criterion", "label_smoothed_cross_entropy", "--disable-validation")
    assert "use --criterion moe_label_smoothed_cross_entropy" in caplog.text


@pytest.mark.parametrize("flags", [("--router", "switch"), ("--router", "dense", "--criterion", "label_smoothed_cross_entropy")])
def test_there_is_no_such_warning_if_no_loss_is_ignored(train, caplog, flags):
    train("--max-update", "1", "--no-save", "--disable-validation", *flags)
    assert "use --criterion" not in caplog.text


METRICS = {"moe_gate_loss", "moe_z_loss", "entropy_gating", "moe_argmax_share", "expert1_balance_top", "expert1_balance_bottom",
           "unused_expert1_count", "overflow_expert1", "moe_experts_per_token", "moe_load_max", "moe_load_min"}  # fmt: skip


def test_metrics_are_in_the_logs_the_load_file_and_tensorboard(train, tmp_path):
    logs = train(
        "--max-update", "4", "--no-save", "--update-freq", "2", "--moe-load-file", tmp_path / "load.jsonl",
        "--moe-load-interval", "2", "--tensorboard-logdir", tmp_path / "board", "--moe-log-layers",
    )  # fmt: skip
    for tag, prefix in (("train_inner", ""), ("train", "train_"), ("valid", "valid_")):
        assert METRICS <= {name[len(prefix) :] for name in logs[tag][0]}
    assert len(logs["train_inner"]) == 4 and all(log["moe_gate_loss"] >= 1.9 for log in logs["train_inner"])  # two layers
    lines = [json.loads(line) for line in (tmp_path / "load.jsonl").read_text().splitlines()]
    assert [line["num_updates"] for line in lines] == [2, 4]
    assert lines[0]["layers"] == ["encoder.layers.0", "decoder.layers.0"]
    words = sum(log["wpb"] for log in logs["train_inner"][:2])
    assert [sum(layer) for layer in lines[0]["load"]] == [words, words]  # the target equals the source
    events = b"".join(path.read_bytes() for path in (tmp_path / "board" / "train_inner").iterdir())
    assert all(name.encode() in events for name in METRICS | {"encoder.layers.0/moe_load_max"})


def test_the_metrics_of_each_layer_are_logged_beside_their_means(train):
    logs = train("--max-update", "1", "--no-save", "--moe-log-layers")
    for tag, prefix in (("train_inner", ""), ("train", "train_"), ("valid", "valid_")):
        (log,) = logs[tag]
        for name in METRICS:
            layers = [log[f"{prefix}{layer}/{name}"] for layer in ("encoder.layers.0", "decoder.layers.0")]
            together = sum(layers) if name.endswith("_loss") else sum(layers) / 2
            assert log[prefix + name] == pytest.approx(together, abs=0.011)  # two digits are logged


@pytest.mark.parametrize("router", ["gshard", "sparsemixer_v2"])
def test_metrics_of_the_second_choice_are_logged_too(train, router):
    (log,) = train("--max-update", "1", "--no-save", "--disable-validation", "--router", router)["train"]
    second = {name.replace("expert1", "expert2") for name in METRICS if "expert1" in name}
    assert {f"train_{name}" for name in METRICS | second} <= set(log)


@pytest.mark.parametrize("flags", [
    ("--store-ema",), ("--encoder-layerdrop", "0.3", "--decoder-layerdrop", "0.3"),
    ("--share-all-embeddings", "--encoder-normalize-before", "--decoder-normalize-before"), ("--checkpoint-activations",),
    ("--router", "switch", "--criterion", "moe_cross_entropy", "--moe-z-loss-weight", "0.01"), ("--router", "dense"),
], ids=lambda flags: flags[0])  # fmt: skip
def test_training_works_with_fairseqs_flags(train, flags):
    logs = train("--max-update", "3", "--no-save", *flags)
    assert len(logs["train_inner"]) == 3 and math.isfinite(logs["valid"][0]["valid_loss"])


@pytest.mark.parametrize("flag", ["--bf16", "--memory-efficient-bf16"])
def test_bf16_trains_and_resumes_on_a_cpu(train, monkeypatch, flag):
    forward, precisions = AuxiliaryLosses.forward, set()

    def observed(self, model, sample, reduce=True):
        precisions.update(parameter.dtype for parameter in model.parameters())
        return forward(self, model, sample, reduce)

    monkeypatch.setattr(AuxiliaryLosses, "forward", observed)
    for updates in ("2", "4"):
        logs = train("--max-update", updates, flag)
        assert len(logs["train_inner"]) == 2 and math.isfinite(logs["valid"][0]["valid_loss"])
    assert precisions == {torch.bfloat16}


@pytest.mark.parametrize("flag", ["--fp16", "--amp"])
def test_flags_that_need_a_gpu_are_parsed_and_build_the_model(flag, translation_data):
    """Neither trains on a CPU, because fairseq's loss scaling calls .cuda()."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    arguments = [str(translation_data), "--user-dir", USER_DIR, "--arch", "transformer_moe_tiny", "--max-tokens", "100", flag]
    args = options.parse_args_and_arch(options.get_training_parser(), arguments)
    cfg = convert_namespace_to_omegaconf(args)
    model = tasks.setup_task(cfg.task).build_model(cfg.model).half()
    assert getattr(cfg.common, flag[2:])
    assert any(isinstance(module, MoELayer) for module in model.modules())


@pytest.mark.slow
def test_the_user_dir_registers_once_under_any_path(tmp_path):
    """Import a relative and an absolute path from another folder, after the package was imported by name."""
    program = f"""
import os
from argparse import Namespace
import fairseq_sparsemixer
from fairseq import models, utils
from fairseq.criterions import CRITERION_REGISTRY
for path in ({USER_DIR!r}, os.path.relpath({USER_DIR!r})):
    utils.import_user_module(Namespace(user_dir=path))
assert models.MODEL_REGISTRY["transformer_moe"].__module__ == "fairseq_sparsemixer.plugin.models.transformer_moe"
assert CRITERION_REGISTRY["moe_cross_entropy"].__module__ == "fairseq_sparsemixer.criterions.moe_cross_entropy"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def multi30k_slice(shared_data, tmp_path_factory):
    """The first 200 pairs of Multi30k, binarised, and the unigram entropy of its English words in bits."""
    from fairseq.data import Dictionary, indexed_dataset

    folder = tmp_path_factory.mktemp("multi30k")
    for language in ("de", "en"):
        with gzip.open(shared_data / "multi30k" / f"train.{language}.gz", "rt", encoding="utf-8") as file:
            lines = [line.strip().lower() for _, line in zip(range(200), file)]
        dictionary = Dictionary()
        for line in lines:
            for word in line.split() + [dictionary.eos_word]:
                dictionary.add_symbol(word)
        dictionary.finalize()
        dictionary.save(str(folder / f"dict.{language}.txt"))
        for part in ("train", "valid"):
            builder = indexed_dataset.make_builder(str(folder / f"{part}.de-en.{language}.bin"), "mmap", len(dictionary))
            for line in lines if part == "train" else lines[:20]:
                builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).int())
            builder.finalize(str(folder / f"{part}.de-en.{language}.idx"))
        counts = Counter(word for line in lines for word in line.split() + ["</s>"])
        total = sum(counts.values())
        entropy = -sum(count / total * math.log2(count / total) for count in counts.values())
    return folder, entropy


@pytest.mark.slow
def test_training_fits_real_text_far_below_its_unigram_entropy(train, multi30k_slice):
    """The model memorises a slice, which shows that gradients reach all parameters, not that it translates well."""
    data, entropy = multi30k_slice
    logs = train(
        "--max-epoch", "12", "--no-save", "--disable-validation", "--max-tokens", "500", "--lr", "0.005",
        "--encoder-embed-dim", "64", "--decoder-embed-dim", "64", "--encoder-ffn-embed-dim", "128",
        "--decoder-ffn-embed-dim", "128", "--log-interval", "5", data=data,
    )  # fmt: skip
    losses = [log["train_nll_loss"] for log in logs["train"]]
    assert losses[0] > entropy - 1 and losses[-1] < entropy - 3, (losses, entropy)
