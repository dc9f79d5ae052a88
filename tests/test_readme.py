"""Runs the README's commands and Python, and compares its figures with the results. Links: test_docs.py."""

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = (
    "--cpu --num-workers 0 --max-update 1 --max-tokens 64 --update-freq 1 --num-experts 2 --encoder-layers 1 --decoder-layers 1"
    " --encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16"
    " --encoder-attention-heads 2 --decoder-attention-heads 2"
).split()


def blocks(language):
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands(program):
    """The words of the README's shell commands for a program, with variables substituted."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").replace("$USER_DIR", str(ROOT / "fairseq_sparsemixer")).splitlines()
    found = [words for words in (shlex.split(line, comments=True) for line in lines) if words[:1] == [program]]
    assert found, f"the README has no {program} command"
    return found


@pytest.mark.parametrize("target", sorted({words[1] for words in commands("make")} | set(re.findall(r"`make (\w+)", README))))
def test_make_targets_exist_and_install_first(target):
    outside = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    }
    plan = subprocess.run(  # `make test` also runs this test, and a nested make prints messages about itself
        ["make", "--no-print-directory", "--dry-run", target], cwd=ROOT, env=outside, capture_output=True, text=True
    )
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout.splitlines()[0].endswith("scripts/install.py")


def run_as_script(monkeypatch, entry_point, words):
    """Call a console script's function with the words of a command."""
    monkeypatch.setattr(sys, "argv", words)
    entry_point()


def test_the_commands_train_translate_and_plot(monkeypatch, tmp_path, capsys, caplog):
    from fairseq import checkpoint_utils
    from fairseq_cli import generate, preprocess, train

    from fairseq_sparsemixer.cli import main

    caplog.set_level(logging.INFO)  # the level in fairseq's scripts without a test runner; needed for train.log
    checkpoint_utils.save_checkpoint.__dict__.pop("best", None)  # fairseq expects to train once per process
    monkeypatch.chdir(tmp_path)
    os.mkdir("corpus")
    os.mkdir("run")
    for split in ("train", "valid", "test"):
        for language, words in (("en", "a b c d"), ("de", "A B C D")):
            Path("corpus", f"{split}.{language}").write_text(f"{words}\n" * 9)
    run_as_script(monkeypatch, preprocess.cli_main, commands("fairseq-preprocess")[0] + ["--workers", "1"])
    words = [word for word in commands("fairseq-train")[0] if word != "--fp16"]  # not on a CPU
    run_as_script(monkeypatch, train.cli_main, words + SMALL)
    (words,) = commands("fairseq-generate")
    run_as_script(monkeypatch, generate.cli_main, words[: words.index(">")] + ["--cpu", "--num-workers", "0"])
    translated = [line for line in capsys.readouterr().out.splitlines() if line.startswith("H-")]
    assert len(translated) == 9  # not a multiple of 8, and no sentence is dropped
    (words,) = commands("fairseq-sparsemixer")
    assert main(words[1:]) == 0
    assert Path("run", "valid_loss.png").is_file()


def test_the_python_code_runs():
    for code in blocks("python"):
        exec(code, {})


def cells(text):
    """The cells of each table row, stripped."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_results_match_the_study():
    study = ROOT / "recipes" / "multilingual" / "results" / "candidates" / "results.md"
    rows = cells(study.read_text(encoding="utf-8"))
    losses, differences = ({row[0]: row for row in rows if len(row) == columns} for columns in (9, 6))
    shown = cells(README[README.index("\n## Results\n") : README.index("\n## Speed\n")])[2:]
    assert len(shown) == 5
    for name, loss, difference, speed_up, load in shown:
        router = "MGCB" if "arg-max" in name else name  # see study.yaml
        assert [loss, load] == [losses[router][3], losses[router][-1]]
        group = router if router == "dense" else f"{router}-e8"
        assert router == "switch" or [difference, speed_up] == differences[group][3:5]


def test_the_quickstart_shows_its_results():
    folder = ROOT / "recipes" / "quickstart"
    shown = cells((folder / "README.md").read_text(encoding="utf-8"))
    first, *others = (folder / "results" / "results.md").read_text(encoding="utf-8").split("\n\n")
    translation = next(part for part in others if part.startswith("| model"))
    for table, length in ((first, 4), (translation, 4)):
        rows = [row for row in cells(table) if "---" not in row[0]]
        assert len(rows) == length and all(row in shown for row in rows)
