"""`--user-dir` from a clone and from the installed package, in each fairseq program, run from another folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_sparsemixer
from fairseq_sparsemixer.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = (
    "encoder_layers=2 decoder_layers=2 encoder_embed_dim=16 encoder_ffn_embed_dim=16 encoder_attention_heads=2"
    " decoder_attention_heads=2 num_experts=2"
).split()


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A copy of the repository's code that is not on Python's path."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("fairseq_sparsemixer", "criterions"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """The working directory of the programs."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="session")
def run(elsewhere):
    """run(program, *arguments, input="", path=None) -> its output. path: a folder to put on Python's path."""

    def run(program, *arguments, input="", path=None):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if path is not None:
            environment["PYTHONPATH"] = str(path)
        command = [sys.executable, "-m", program, *map(str, arguments)]
        result = subprocess.run(command, cwd=elsewhere, env=environment, input=input, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result.stdout

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The same eight sentence pairs as training and validation data, binarised by fairseq-preprocess."""
    from fairseq import options
    from fairseq_cli.preprocess import main as preprocess

    folder = tmp_path_factory.mktemp("data")
    for language, words in (("en", "a b c d"), ("de", "A B C D")):
        (folder / f"text.{language}").write_text(f"{words}\n" * 8)
    text, flags = str(folder / "text"), ["--source-lang", "en", "--target-lang", "de", "--destdir", str(folder / "bin")]
    flags += ["--trainpref", text, "--validpref", text, "--testpref", text]
    preprocess(options.get_preprocessing_parser().parse_args(flags))
    return folder / "bin"


@pytest.fixture(scope="session")
def checkpoint(clone, data, elsewhere, run):
    """The checkpoint of a fairseq-train run with a relative --user-dir."""
    user_dir = os.path.relpath(clone / "fairseq_sparsemixer", elsewhere)
    flags = "--task translation --arch transformer_moe_tiny --cpu --max-update 1 --max-tokens 64 --optimizer adam"
    model = [word for option in MODEL for word in ("--" + option.split("=")[0].replace("_", "-"), option.split("=")[1])]
    criterion = ["--criterion", "moe_label_smoothed_cross_entropy"]
    run("fairseq_cli.train", data, "--user-dir", user_dir, *flags.split(), *model, *criterion, "--save-dir", "train")
    return elsewhere / "train" / "checkpoint_last.pt"


@pytest.mark.slow
def test_fairseq_train(checkpoint):
    assert checkpoint.is_file()


@pytest.mark.slow
def test_fairseq_validate(clone, data, checkpoint, run):
    flags = ["--task", "translation", "--path", checkpoint, "--max-tokens", 64, "--cpu"]
    run("fairseq_cli.validate", data, "--user-dir", clone / "fairseq_sparsemixer", *flags)


@pytest.mark.slow
def test_fairseq_interactive(clone, data, checkpoint, run):
    flags = ["--user-dir", clone / "fairseq_sparsemixer", "--path", checkpoint, "--cpu", "--beam", 1]
    output = run("fairseq_cli.interactive", data, *flags, input="a b c d\n")
    assert "H-0\t" in output


@pytest.mark.slow
def test_fairseq_hydra_train_with_the_quickstarts_config(clone, data, elsewhere, run):
    paths = [f"common.user_dir={clone / 'fairseq_sparsemixer'}", f"task.data={data}"]
    paths.append("task.target_lang=de")  # of this data
    small = [f"model.{option}" for option in MODEL] + ["model.share_all_embeddings=false", "model.decoder_embed_dim=16"]
    config = ["--config-dir", ROOT / "recipes" / "quickstart", "--config-name", "quickstart"]
    budget = ["optimization.max_update=1", f"checkpoint.save_dir={elsewhere / 'hydra'}"]
    run("fairseq_cli.hydra_train", *config, *paths, *small, *budget)
    assert (elsewhere / "hydra" / "checkpoint_last.pt").is_file()


@pytest.mark.slow
def test_fairseq_generate_with_the_installed_package(clone, data, checkpoint, tmp_path, run):
    flags = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "--target", tmp_path]
    run("pip", "install", *flags, clone)
    user_dir = run("fairseq_sparsemixer", "user-dir", path=tmp_path).strip()
    assert user_dir == str(tmp_path / "fairseq_sparsemixer")
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".dist-info"} == {"fairseq_sparsemixer", "bin"}
    flags = ["--user-dir", user_dir, "--path", checkpoint, "--cpu", "--beam", 1]
    output = run("fairseq_cli.generate", data, *flags, path=tmp_path)
    assert "H-0\t" in output


def test_the_command_prints_this_packages_folder(capsys):
    assert main(["user-dir"]) == 0
    assert capsys.readouterr().out.strip() == str(Path(fairseq_sparsemixer.__file__).parent)
