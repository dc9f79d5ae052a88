"""Tests for every supported fairseq: stock 0.12.2 (Python 3.8 to 3.10) and later distributions (3.11 and later).

Models build, compute and train all their parameters; runs resume and translate; each fairseq reads the other's checkpoints
(see make_checkpoints.py) and computes the same.
"""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest
import runs
import torch
from fairseq import checkpoint_utils
from fairseq.models import build_model

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.upcycling import upcycle
from fairseq_sparsemixer.plugin.models.fast_path import NAME_OF_COPY

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("make_checkpoints", HERE / "make_checkpoints.py")
make_checkpoints = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_checkpoints)

WRITTEN = [(name, model) for name in ("stock", "fixed") for model in ("transformer", "transformer_moe")]
SIZES = dict(encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_layers=2, encoder_attention_heads=2, dropout=0.0)
SIZES.update(decoder_embed_dim=16, decoder_ffn_embed_dim=32, decoder_layers=2, decoder_attention_heads=2)
SIZES.update(attention_dropout=0.0, activation_dropout=0.0, max_positions=32, tokens_per_sample=32, num_experts=2)
SIZES.update(decoder_input_dim=16, decoder_output_dim=16, max_target_positions=32)
SWITCH = {"router": "switch", "jitter_eps": 0.0}
ROUTERS = {"dense": {"router": "dense"}, "all layers": {**SWITCH, "moe_freq": 1}, "every second": SWITCH}
ENCODER_ONLY = {**SWITCH, "moe_encoder_only": True}


@pytest.fixture
def build(translation_task, language_modeling_task, masked_lm_task):
    tasks = {"transformer_moe": translation_task, "transformer_lm_moe": language_modeling_task}

    def build(model, **flags):
        arch = model if model == "transformer_lm_moe" else f"{model}_tiny"  # transformer_lm_moe uses its dataclass defaults
        return build_model(Namespace(arch=arch, **{**SIZES, **flags}), tasks.get(model, masked_lm_task))

    return build


@pytest.fixture
def inputs(translation_batch, language_modeling_batch, masked_lm_batch):
    """inputs(model) -> the arguments of its forward, with padding."""

    def inputs(model):
        if model == "transformer_moe":
            return translation_batch(3, 6, 5)["net_input"]
        if model == "transformer_lm_moe":
            return language_modeling_batch(3, 6, 5)["net_input"]
        sample = masked_lm_batch(3, 6, 5)
        return {**sample["net_input"], **({"target": sample["target"]} if model == "electra_moe" else {})}

    return inputs


@pytest.mark.parametrize("flags", [*ROUTERS.values(), ENCODER_ONLY], ids=[*ROUTERS, "encoder only"])
@pytest.mark.parametrize("model", ["transformer_moe", "transformer_lm_moe", "roberta_moe", "electra_moe"])
def test_every_parameter_gets_a_gradient_and_evaluation_agrees_with_training(model, flags, build, inputs):
    if "moe_encoder_only" in flags and model != "transformer_moe":
        pytest.skip("a flag of transformer_moe")
    built, batch = build(model, **flags), inputs(model)
    assert not any(NAME_OF_COPY.fullmatch(name) for name in built.state_dict())
    sum(part.float().square().sum() for part in built(**batch)[:2] if torch.is_tensor(part)).backward()
    without = [name for name, p in built.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    restored = build(model, **flags)
    restored.load_state_dict(built.state_dict())  # after that, fairseq 0.12.2 would use its fused path in evaluation
    batch.pop("target", None)  # for ELECTRA, run only the discriminator
    with torch.no_grad():
        trained, evaluated = built.train()(**batch)[0], restored.eval()(**batch)[0]
    torch.testing.assert_close(
        trained[:, :3], evaluated[:, :3], rtol=1e-5, atol=1e-5
    )  # later positions are padding in some sentences


@pytest.mark.slow
@pytest.mark.parametrize("router", ["switch", "dense"])
def test_a_resumed_run_has_the_same_losses_and_translates(router, corpus, tmp_path):
    flags = ("--router", router, "--moe-freq", "2", "--store-ema")
    whole = runs.train(corpus, tmp_path / "whole", *flags, updates=4)
    first = runs.train(corpus, tmp_path / "parts", *flags, updates=2)
    assert first + runs.train(corpus, tmp_path / "parts", *flags, updates=4) == whole and len(whole) == 4
    assert len(runs.generate(corpus, tmp_path / "whole" / "checkpoint_last.pt", tmp_path)) == 8 * 1


@pytest.mark.parametrize("name, model", WRITTEN)
def test_a_checkpoint_gives_the_same_outputs_on_any_fairseq(name, model, corpus):
    expected = torch.tensor(json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))[model])
    torch.testing.assert_close(make_checkpoints.outputs(HERE / f"{name}-{model}.pt", corpus), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stock", "fixed"])
def test_a_run_resumes_from_another_fairseqs_checkpoint(name, corpus, tmp_path):
    flags = [
        *make_checkpoints.SIZES[: make_checkpoints.SIZES.index("--optimizer")],
        *make_checkpoints.MODELS["transformer_moe"].split(),
    ]
    losses = runs.train(corpus, tmp_path, *flags, "--restore-file", HERE / f"{name}-transformer_moe.pt", updates=4)
    assert len(losses) == 2  # optimizer state and number of updates were restored
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    assert state["optimizer_history"][-1]["num_updates"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stock", "fixed"])
def test_a_dense_checkpoint_loads_as_dense_and_can_be_upcycled(name, corpus, tmp_path):
    state = torch.load(HERE / f"{name}-transformer.pt", weights_only=False)
    copies = [key for key in state["model"] if NAME_OF_COPY.fullmatch(key)]
    assert len(copies) == (8 if name == "stock" else 0)
    arguments = {"arch": "transformer_moe", "_name": "transformer_moe", "router": "dense"}
    vars(state["cfg"]["model"]).update(arguments)
    torch.save(state, tmp_path / "dense.pt")
    state = torch.load(HERE / f"{name}-transformer.pt", weights_only=False)
    torch.save(upcycle(state, MoEOptions(router="hash", num_experts=2, moe_freq=1)), tmp_path / "moe.pt")
    expected = torch.tensor(json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["transformer"])
    for file in ("dense.pt", "moe.pt"):  # hash weights one of the equal experts by 1, so the function is the same
        torch.testing.assert_close(make_checkpoints.outputs(tmp_path / file, corpus), expected, rtol=0, atol=2e-6)
    figures = tmp_path / "figures.json"
    assert main(["inspect", str(HERE / f"{name}-transformer.pt"), "--json", str(figures)]) == 0
    trained = sum(value.numel() for value in parameters_of(tmp_path / "dense.pt", corpus))
    assert json.loads(figures.read_text())["parameters"] == trained  # copies do not count


def parameters_of(checkpoint, data):
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides={"data": str(data)})
    return list(model.parameters())


def test_dense_models_compile_to_torchscript_and_models_with_experts_are_refused(build, inputs):
    batch = inputs("transformer_moe")
    dense = build("transformer_moe", router="dense").eval()
    arguments = batch["src_tokens"], batch["src_lengths"], batch["prev_output_tokens"]
    expected = dense(*arguments)[0]
    compiled = torch.jit.script(dense)
    torch.testing.assert_close(compiled(*arguments)[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(dense(*arguments)[0], expected)
    for model in ("transformer_moe", "transformer_lm_moe", "roberta_moe"):
        with pytest.raises(ConfigurationError, match="torch.jit.script cannot compile a model with experts"):
            torch.jit.script(build(model, router="switch"))
