"""No setting in a checkpoint runs as code in any module of fairseq, including modules imported later."""

import ast
import importlib
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, Iterator, Tuple

import fairseq
import fairseq_cli
import pytest
import runs
import torch
from fairseq import checkpoint_utils, utils
from omegaconf import OmegaConf

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.literals import literal
from fairseq_sparsemixer.plugin.checkpoints.reading import READERS
from fairseq_sparsemixer.plugin.checkpoints.settings import EVALUATED, refuse_code

PACKAGES = [Path(package.__file__).parent for package in (fairseq, fairseq_cli)]
FROM_THE_COMMAND_LINE = {  # these evaluate --model-overrides, not settings from a file
    "fairseq_cli.validate": "eval(getattr(override_args, 'model_overrides', '{}'))",
    "fairseq_cli.eval_lm": "eval(cfg.common_eval.model_overrides)",
}
OF_OTHER_RANKS = {"fairseq.distributed.utils"}  # loads data sent by a rank of the same run


def calls(*names: str) -> Iterator[Tuple[str, ast.Call]]:
    """(module, call) for each call of these functions in the installed fairseq, except in its examples."""
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            if "examples" not in parts:
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
                        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), node


@pytest.mark.slow
def test_every_eval_in_fairseq_evaluates_only_literals():
    found = list(calls("eval", "builtins.eval"))
    assert len(found) > 30
    for name, call in found:
        if name in FROM_THE_COMMAND_LINE:
            assert ast.unparse(call) == FROM_THE_COMMAND_LINE[name]
        else:
            assert importlib.import_module(name).eval is literal, f"{name}: {ast.unparse(call)}"


@pytest.mark.slow
def test_fairseq_has_no_other_exec_or_compile():
    assert not list(calls("exec", "compile", "builtins.exec", "execfile"))


@pytest.mark.slow
def test_every_setting_that_fairseq_evaluates_is_checked_when_reading():
    for name, call in calls("eval"):
        argument = call.args[0]
        if isinstance(argument, ast.Attribute) and name not in FROM_THE_COMMAND_LINE:
            assert argument.attr in EVALUATED, f"{name}: {ast.unparse(call)}"
    for name, call in calls("utils.eval_bool", "options.eval_bool", "utils.eval_str_list", "options.eval_str_list"):
        assert not isinstance(call.args[0], ast.Attribute) or call.args[0].attr in EVALUATED, f"{name}: {ast.unparse(call)}"


@pytest.mark.slow
def test_every_file_that_fairseq_unpickles_is_read_safely():
    for name, call in calls("torch.load", "pickle.load"):
        assert name in READERS or name in OF_OTHER_RANKS, f"{name}: {ast.unparse(call)}"
        if name in READERS:
            assert importlib.import_module(name).torch.load is not torch.load


def test_a_module_imported_later_evaluates_only_literals(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text("def value(text):\n    return eval(text)\n\n\nfirst = value('[1] * 2')\n")
    monkeypatch.setattr(fairseq, "__path__", [*fairseq.__path__, str(tmp_path)])
    module = importlib.import_module("fairseq.made_up")
    try:
        assert module.first == [1, 1]
        with pytest.raises(ConfigurationError, match="is not evaluated"):
            module.value(f"open({str(tmp_path / 'trace')!r}, 'w')")
    finally:
        del sys.modules["fairseq.made_up"]
    assert not (tmp_path / "trace").exists()


def test_command_line_values_are_evaluated_as_before():
    assert utils.eval_str_list("[0.9, 0.98]") == [0.9, 0.98] and utils.eval_str_list("3", type=int) == [3]
    assert utils.eval_bool("True") is True and utils.eval_bool("0") is False and utils.eval_bool(None, True) is True
    assert utils.eval_bool(True, default=False) is False  # only strings are evaluated, as with eval


def places(code: str) -> Iterator[dict]:
    """Parts of checkpoints with `code` in a setting that some module of fairseq would evaluate."""
    model = {"_name": "fconv", "encoder_layers": code}
    yield {"cfg": {"model": model}}
    yield {"cfg": {"model": Namespace(**model)}}
    yield {"cfg": {"model": {"_name": "wav2vec_ctc", "w2v_args": {"model": {"conv_feature_layers": code}}}}}
    yield {"cfg": {"model": {"_name": "x", "w2v_args": Namespace(model=[{"conv_aggregator_layers": code}])}}}
    yield {"cfg": {"criterion": {"_name": "ctc", "wer_args": code}}}
    yield {"cfg": {"optimizer": {"adam_betas": code}}}
    yield {"args": Namespace(arch="fconv", decoder_attention=code)}
    yield {"cfg": None, "args": Namespace(arch="lightconv_lm", character_filters=code)}


def test_code_in_any_setting_is_refused_when_reading(tmp_path):
    trace, path = tmp_path / "trace", str(tmp_path / "m.pt")
    for part in places(f"open({str(trace)!r}, 'w') and [(8, 3)] * 2"):
        torch.save({"model": {}, "optimizer_history": [{}], "extra_state": {}, **part}, path)
        for read in (read_checkpoint, checkpoint_utils.load_checkpoint_to_cpu):
            with pytest.raises(ConfigurationError, match=r"m.pt has code in its settings: \w+ = .open") as error:
                read(path)
            assert "\n" not in str(error.value)
    assert not trace.exists()


def test_literal_settings_are_accepted(tmp_path):
    for part in places("[(512, 3)] * 20"):
        refuse_code("m.pt", {"model": {}, **part})
    own: Any = {"encoder_layers": 6, "decoder_attention": "True", "adaptive_softmax_cutoff": "100,200", "wer_args": None}
    own["itself"] = own
    refuse_code("m.pt", {"cfg": {"model": own, "task": {"note": "open('x')"}}})
    refuse_code(
        "m.pt", {"cfg": OmegaConf.create({"model": {"encoder_layers": "[(512, 3)] * 20", "of": "${model.encoder_layers}"}})}
    )


@pytest.fixture
def with_code(corpus, tmp_path) -> Tuple[Path, Path]:
    """(a checkpoint of fconv with code in its settings, the file that the code would create)."""
    trace, path = tmp_path / "trace", tmp_path / "fconv.pt"
    model = {"_name": "fconv", "encoder_layers": f"open({str(trace)!r}, 'w') and [(8, 3)] * 2"}
    task = {"_name": "translation", "data": str(corpus), "source_lang": "de", "target_lang": "en"}
    history = [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 1}]
    state = {"model": {}, "optimizer_history": history, "extra_state": {"train_iterator": {"epoch": 1}}}
    torch.save({**state, "cfg": {"model": model, "task": task, "common_eval": {}}}, path)
    return path, trace


def test_no_command_runs_code_from_settings(with_code, corpus, tmp_path):
    path, trace = with_code
    (tmp_path / "a.txt").write_text("w1\n")
    text = ["--text", str(tmp_path / "a.txt"), "--target", str(tmp_path / "a.txt")]
    for use in (
        lambda: runs.generate(corpus, path, tmp_path / "results"),
        lambda: runs.train(corpus, tmp_path / "run", "--restore-file", path, updates=1),
        lambda: runs.train(corpus, tmp_path / "run", "--finetune-from-model", path, updates=1),
        lambda: checkpoint_utils.load_model_ensemble_and_task([str(path)]),
        lambda: main(["inspect", str(path), *text]),
        lambda: main(["fidelity", "--checkpoint", str(path), *text]),
    ):
        with pytest.raises(SystemExit, match="fconv.pt has code in its settings: encoder_layers"):
            use()
    assert not trace.exists()


def test_code_in_overrides_is_not_run(with_code, corpus):
    path, trace = with_code
    state = torch.load(path, weights_only=True)
    settings = state["cfg"]["model"]
    code, settings["encoder_layers"] = settings["encoder_layers"], "[(8, 3)] * 2"
    torch.save(state, path)
    with pytest.raises(ConfigurationError, match="is not evaluated"):
        checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides={"encoder_layers": code})
    assert not trace.exists()
