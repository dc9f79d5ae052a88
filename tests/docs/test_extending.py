"""docs/extending.md: the folder it builds trains and generates, and its tests pass."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.moe.gates import GATES

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# my_moe/(\w+\.py)\n(.*?)```", TEXT, re.S))
SMALL = (
    "--encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 24 --decoder-ffn-embed-dim 24 --max-update 2"
    " --encoder-attention-heads 2 --decoder-attention-heads 2 --cpu --num-workers 0 --log-format json --log-interval 1"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with my_moe as on the page."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "my_moe").mkdir()
    for name, code in FILES.items():
        (folder / "my_moe" / name).write_text(code, encoding="utf-8")
    return folder


def page_command(program, data):
    """The words of the page's command for a program, with the given data."""
    lines = TEXT.replace("\\\n", " ").splitlines()
    (words,) = [shlex.split(line) for line in lines if line.startswith(program + " ")]
    return [str(data) if word == "data-bin" else word for word in words]


ONE_PROCESS = """
import json, sys
from fairseq import checkpoint_utils
from fairseq_cli import generate, train
for words in json.loads(sys.argv[1]):
    checkpoint_utils.save_checkpoint.__dict__.pop("best", None)  # fairseq expects a process to train once
    program, sys.argv = words[0], words
    print("=====", flush=True)
    {"fairseq-train": train, "fairseq-generate": generate}[program].cli_main()
"""


@pytest.fixture(scope="module")
def outputs(folder, corpus):
    """The output of the page's training and fairseq-generate, and of training with its estimator and its second criterion."""
    base = [
        "fairseq-train",
        str(corpus),
        *"--user-dir my_moe --arch transformer_moe_tiny --num-experts 4 --no-save".split(),
        *SMALL,
    ]
    base += "--optimizer adam --lr 0.01 --max-tokens 200 --disable-validation --criterion moe_cross_entropy_two_weights".split()
    commands = [
        page_command("fairseq-train", corpus) + SMALL,
        page_command("fairseq-generate", corpus) + "--cpu --num-workers 0 --gen-subset valid --max-len-b 5".split(),
        base + "--gradient-estimator gauss2".split(),
        base + "--router noisy_topk --moe-load-loss-weight 0.3".split(),
    ]
    command = [sys.executable, "-c", ONE_PROCESS, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return dict(zip(("train", "generate", "estimator", "weights"), done.stdout.split("=====")[1:]))


def updates(output):
    """The metrics of each update, from fairseq's log."""
    return [json.loads(line) for line in re.findall(r"train_inner\W+(\{.*\})", output)]


@pytest.mark.slow
def test_the_router_trains_from_a_custom_user_dir(outputs):
    log = updates(outputs["train"])
    assert len(log) == 2
    assert "expert3_balance_top" in log[-1] and "expert4_balance_top" not in log[-1]  # --moe-top-k 3
    assert "moe_gate_loss" in log[-1]  # logged by the folder's criterion


@pytest.mark.slow
def test_its_checkpoint_generates(outputs):
    assert len(re.findall("^H-", outputs["generate"], re.M)) == 8


@pytest.mark.slow
def test_the_estimator_trains(outputs):
    assert len(updates(outputs["estimator"])) == 2


@pytest.mark.slow
def test_the_criterion_with_two_weights_trains(outputs):
    assert "moe_load_loss" in updates(outputs["weights"])[-1]


@pytest.mark.slow
def test_the_tests_on_the_page_pass(folder):
    tests = [name for name in FILES if name.startswith("test_")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=folder / "my_moe", capture_output=True, text=True)
    assert f"{len(tests)} passed" in done.stdout, done.stdout


def test_the_router_has_at_most_30_lines_and_makes_a_layer():
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
