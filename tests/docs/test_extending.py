"""docs/extending.md: the folder it builds trains and generates, and the tests it shows pass."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.gates import GATES

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# my_moe/(\w+\.py)\n(.*?)```", TEXT, re.S))
SMALL = (
    "--encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 24 --decoder-ffn-embed-dim 24 --max-update 2"
    " --encoder-attention-heads 2 --decoder-attention-heads 2 --cpu --num-workers 0 --log-format json --log-interval 1"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with my_moe as the page has it."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "my_moe").mkdir()
    for name, code in FILES.items():
        (folder / "my_moe" / name).write_text(code, encoding="utf-8")
    return folder


def run(folder, *words):
    """A module run as a program in that folder; its output."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def page_command(program, data):
    """The page's command of a program, on that data."""
    lines = TEXT.replace("\\\n", " ").splitlines()
    (words,) = [shlex.split(line) for line in lines if line.startswith(program)]
    return [data if word == "data-bin" else word for word in words[1:]]


@pytest.fixture(scope="module")
def log(folder, corpus):
    """Of the page's training: a list of figures by tag."""
    output = run(folder, "fairseq_cli.train", *page_command("fairseq-train", corpus), *SMALL)
    return [json.loads(line) for line in re.findall(r"train_inner \| (\{.*\})", output)]


def test_the_router_trains_through_a_folder_of_ones_own(log):
    assert len(log) == 2
    assert "expert3_balance_top" in log[-1] and "expert4_balance_top" not in log[-1]  # --moe-top-k 3
    assert "moe_gate_loss" in log[-1]  # by the criterion of the folder


def test_its_checkpoint_generates(folder, corpus, log):
    words = page_command("fairseq-generate", corpus)
    output = run(folder, "fairseq_cli.generate", *words, "--cpu", "--num-workers", 0, "--gen-subset", "valid", "--max-len-b", 5)
    assert len(re.findall("^H-", output, re.M)) == 8


def test_the_estimator_and_a_weight_of_its_own_for_a_loss_train(folder, corpus):
    words = [corpus, "--user-dir", "my_moe", "--arch", "transformer_moe_tiny", "--num-experts", 4, "--no-save", *SMALL]
    words += "--criterion moe_cross_entropy_two_weights --optimizer adam --lr 0.01 --max-tokens 200 --disable-validation".split()
    assert "num_updates: 2" in run(folder, "fairseq_cli.train", *words, "--gradient-estimator", "gauss2")
    log = run(folder, "fairseq_cli.train", *words, "--router", "noisy_topk", "--moe-load-loss-weight", 0.3)
    assert '"moe_load_loss"' in log


def test_the_tests_on_the_page_pass(folder):
    tests = [name for name in FILES if name.startswith("test_")]
    assert f"{len(tests)} passed" in run(folder, "pytest", "-q", *(f"my_moe/{name}" for name in tests))


def test_the_router_has_30_lines_and_makes_a_layer():
    body = FILES["routers.py"][FILES["routers.py"].index("@register_gate") :].strip().splitlines()
    assert len(body) <= 30
    (layer,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "build_moe_layer(" in code]
    try:
        exec(FILES["routers.py"], {})
        names = {"build_moe_layer": build_moe_layer}
        exec(layer, names)
        assert names["y"].shape == (10, 16) and names["layer"].gate.router == "sigmoid_topk"
    finally:
        GATES.pop("sigmoid_topk", None)
