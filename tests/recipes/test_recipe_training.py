"""The fairseq-hydra-train command of a recipe's `train`."""

import shlex

import pytest
import torch
from fairseq.data.indexed_dataset import make_builder
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.session import Recipe, main
from recipes.common.steps import run_step
from recipes.common.training import as_override, read_log_line, train

CONFIG = "optimization:\n  max_update: 7\nmodel:\n  num_experts: 4\n"


def read_by_hydra(text):
    (override,) = OverridesParser.create().parse_overrides([f"key={text}"])
    return override.value()


@pytest.mark.parametrize("value", ["plain", "/with space/a,b", "it's (odd)", r"D:\\a\b c", True, None, 0.1, 3, [4], "a=b"])
def test_hydra_reads_back_the_value_of_an_override(value):
    assert read_by_hydra(as_override(value)) == value


@pytest.mark.parametrize("value", ["it's (odd)\\", r"\\'\'' \\"])
def test_hydra_reads_back_backslashes_before_a_quote(value):
    if read_by_hydra(r"'a\\'") != "a\\":
        pytest.skip("in this hydra version, quoted text cannot end in a single backslash")
    assert read_by_hydra(as_override(value)) == value


def test_progress_is_read_from_both_forms_of_fairseqs_log():
    log = '{"epoch": 1, "loss": "5.2", "wps": "1234.5", "num_updates": "20"}'
    for line in (f"2026-01-01 00:00:00 | INFO | train_inner | {log}\n", f"[2026-01-01 00:00:00,1][train_inner][INFO] - {log}\n"):
        assert read_log_line(line) == (20, "loss 5.2, 1,234 words/s")
    assert read_log_line(f"[2026-01-01 00:00:00,1][valid][INFO] - {log}\n") is None


@pytest.fixture
def run(tmp_path):
    """run(option, ...): `train` of a recipe with prepared data."""
    config = tmp_path / "settings.yaml"
    config.write_text(CONFIG)

    def step(session):
        run_step("data", session.data, {}, Console(quiet=True), lambda *_: None)
        train(session, config, session.data, batch_tokens=4096, device_tokens=1024)

    recipe = Recipe("some", config, "", step, step, step, lambda parser: None)
    return lambda *options: main(recipe, ["train", "--out", str(tmp_path / "out"), *options])


@pytest.mark.parametrize("gpus, nodes, tokens, micro_batches", [(1, 1, 1024, 4), (2, 1, 1024, 2), (8, 1, 512, 1), (8, 2, 256, 1)])
def test_the_effective_batch_does_not_depend_on_the_number_of_devices(run, capsys, gpus, nodes, tokens, micro_batches):
    run("--dry-run", "--gpus", str(gpus), "--nodes", str(nodes), "--slurm", "job")
    said = capsys.readouterr().out
    assert f"dataset.max_tokens={tokens}" in said and f"optimization.update_freq=[{micro_batches}]" in said
    assert tokens * micro_batches * gpus * nodes == 4096


@pytest.mark.parametrize("options, message", [
    (("--gpus", "8", "--nodes", "2"), "less than the longest sentence .300 tokens.; use at most 13 dev"),
    (("--gpus", "1", "--device-tokens", "299"), "the longest sentence .300 tokens.; give --device-tokens 600 or more"),
])  # fmt: skip
def test_devices_without_room_for_the_longest_sentence_are_refused_before_fairseq_asserts(run, tmp_path, options, message):
    run("--dry-run", "--gpus", "8", "--nodes", "2", "--slurm", "job")  # nothing is prepared yet
    run("--gpus", "1", "--slurm", str(tmp_path / "job.sh"))
    for split, length in (("train", 7), ("valid", 300), ("test", 5000)):
        builder = make_builder(str(tmp_path / "out" / "data" / f"{split}.de-en.de.bin"), "mmap", vocab_size=10)
        builder.add_item(torch.ones(length, dtype=torch.int32))
        builder.finalize(str(tmp_path / "out" / "data" / f"{split}.de-en.de.idx"))
    run("--dry-run", "--gpus", "8")
    with pytest.raises(ConfigurationError, match=message):
        run("--dry-run", *options)


def test_slurm_writes_a_script_with_one_task_per_gpu_and_trains_nothing(run, tmp_path):
    run("--gpus", "4", "--nodes", "2", "--slurm", str(tmp_path / "job.sh"))
    text = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --nodes=2" in text and "#SBATCH --ntasks-per-node=4" in text and "#SBATCH --requeue" in text
    (command,) = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("srun")]
    words = shlex.split(command)
    assert words[1].endswith("fairseq-hydra-train") and "+distributed_training.distributed_world_size=8" in words
    assert "+distributed_training.distributed_port=29500" in words  # without a port, fairseq assumes a single machine
    assert not (tmp_path / "out" / "sparsemixer-e4-seed1" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize("options, experts", [((), 4), (("--num-experts", "2"), 2)])
def test_the_number_of_experts_is_the_files_or_the_options(run, capsys, options, experts):
    run("--dry-run", *options)
    assert f"model.num_experts={experts}" in capsys.readouterr().out


def test_several_machines_without_slurm_are_refused(run):
    with pytest.raises(ConfigurationError, match="--nodes 2 needs --slurm FILE"):
        run("--gpus", "1", "--nodes", "2")


def test_a_run_with_other_settings_is_not_overwritten(run, tmp_path):
    run("--gpus", "4", "--slurm", str(tmp_path / "job.sh"))
    checkpoint = tmp_path / "out" / "sparsemixer-e4-seed1" / "checkpoint_last.pt"
    checkpoint.write_bytes(b"days of training")
    run("--gpus", "2", "--slurm", str(tmp_path / "job.sh"))
    with pytest.raises(ConfigurationError, match="holds a run with other settings"):
        run("--gpus", "4", "--slurm", str(tmp_path / "job.sh"), "--updates", "9")
    assert checkpoint.exists()


def test_a_routers_options_reach_training_and_name_the_run(run, capsys):
    run("--dry-run", "--router-option", "sampled=false,scaled=false")
    said = capsys.readouterr().out
    assert "+model.router_option" in said and "sampled=false,scaled=false" in said
    assert "sparsemixer-sampled_False-scaled_False-e4-seed1" in said


@pytest.mark.parametrize(
    "router, option", [("sparsemixer", "temperature=2"), ("sparsemixer", "a/b=c"), ("switch", "x"), ("dense", "x=1")]
)
def test_options_that_a_router_does_not_take_are_refused(run, router, option):
    with pytest.raises(ConfigurationError, match=f"--router-option {option} (does not work with --router {router}|must be NAME)"):
        run("--router", router, "--router-option", option)


def test_an_unknown_router_is_refused_with_the_list_of_routers(run):
    with pytest.raises(ConfigurationError, match="--router swich is unknown; choose from .*switch"):
        run("--router", "swich")
