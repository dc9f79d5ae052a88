"""`fairseq-sparsemixer upcycle`: a dense checkpoint becomes one with experts that gives the same outputs."""

import json
import os
import shutil
from pathlib import Path

import pytest
import runs
import torch
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

import fairseq_sparsemixer
from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import Gate, Routing, register_gate
from fairseq_sparsemixer.moe.gates.registry import GATES
from fairseq_sparsemixer.moe.layer import moe_layers
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.starting_gates import indifferent_gate
from fairseq_sparsemixer.plugin.checkpoints.upcycling import _require_fit, _with_experts, upcycle
from fairseq_sparsemixer.plugin.models.fast_path import knows_copies

USER_DIR = Path(fairseq_sparsemixer.__file__).parent
ROUTERS = {  # flags, and the factor on the output of k equal experts by the papers' formulas
    "switch": (["--router", "switch"], 1 / 4),
    "sparsemixer": (["--router", "sparsemixer"], 1 / 4),
    "sparsemixer_v2": (["--router", "sparsemixer_v2"], 1 / 4 + 1 / 3),
    "gshard": (["--router", "gshard"], 1.0),
    "hash": (["--router", "hash"], 1.0),
    "dense_st": (["--router", "dense_st", "--moe-top-k", "2"], 2 / 4),
}


@pytest.fixture(autouse=True)
def without_fused_layers(monkeypatch):
    """Disable the fused layers of fairseq 0.12.2's own transformer, which need torch 1 in evaluation after loading a state."""
    if knows_copies():
        monkeypatch.setattr(TransformerEncoderLayerBase, "_load_from_state_dict", torch.nn.Module._load_from_state_dict)


@pytest.fixture(scope="module")
def dense(corpus, tmp_path_factory) -> Path:
    """A checkpoint of fairseq's own transformer, with an EMA copy."""
    folder = tmp_path_factory.mktemp("dense")
    flags = ("--arch", "transformer_tiny", "--criterion", "cross_entropy", "--store-ema", "--ema-fp32")
    runs.train(corpus, folder, *flags, updates=2, moe=False)
    return folder / "checkpoint_last.pt"


def load(checkpoint: Path) -> torch.nn.Module:
    from fairseq import checkpoint_utils

    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    return model.eval()


def logits(checkpoint: Path, sample) -> torch.Tensor:
    return load(checkpoint)(**sample["net_input"])[0]


@pytest.mark.parametrize("router", ROUTERS)
def test_the_first_forward_equals_the_dense_model(router, dense, tmp_path, translation_batch, capsys):
    flags, multiplier = ROUTERS[router]
    out, figures = tmp_path / "moe.pt", tmp_path / "figures.json"
    assert main(["upcycle", str(dense), str(out), "--num-experts", "4", "--moe-freq", "1", *flags, "--json", str(figures)]) == 0
    assert "3 layers of 4 experts" in capsys.readouterr().out
    assert json.loads(figures.read_text())["layers"] == 3
    sample = translation_batch(3, 7, 5)
    real = sample["net_input"]["prev_output_tokens"].ne(1)  # expert layers give zero at padding
    torch.testing.assert_close(logits(out, sample)[real], logits(dense, sample)[real], rtol=1e-5, atol=1e-5)
    found = indifferent_gate(16, MoEOptions(router=router, num_experts=4, moe_top_k=2 if "--moe-top-k" in flags else None))
    assert found.multiplier == pytest.approx(multiplier, rel=1e-5)


@pytest.mark.parametrize("router", ["switch", "sparsemixer", "gshard"])
def test_with_nllbs_regularisers_too_the_first_forward_equals_the_dense_model(router, dense, tmp_path, translation_batch):
    """The factors of masking at inference are compensated, and the dense layer is the shared network of --moe-cmr, too."""
    out = tmp_path / "moe.pt"
    flags = "--num-experts 4 --moe-freq 1 --moe-eom 0.2 --moe-fom 0.25 --moe-cmr --moe-cmr-gate-dropout 0.1".split()
    assert main(["upcycle", str(dense), str(out), "--router", router, *flags]) == 0
    sample = translation_batch(3, 7, 5)
    real = sample["net_input"]["prev_output_tokens"].ne(1)
    torch.testing.assert_close(logits(out, sample)[real], logits(dense, sample)[real], rtol=1e-5, atol=1e-5)
    model = load(out)
    model(**sample["net_input"])
    for layer in moe_layers(model):
        assert (layer.eom, layer.fom, layer.cmr.gate_dropout) == (0.2, 0.25, 0.1)
        assert set(layer.routing.cmr_gate.tolist()) == {0.0, 0.5}  # padding, tokens


GRANULAR = {
    "one group": "--router topk --moe-top-k 4 --granularity 4".split(),
    "two groups": "--router topk --moe-top-k 4 --granularity 2".split(),
    "gshard": "--router gshard --granularity 2".split(),
    "with a shared network": "--router topk --moe-top-k 4 --moe-cmr --granularity 4".split(),
}


@pytest.mark.parametrize("kind", GRANULAR)
def test_slices_of_the_dense_layer_compute_the_same(kind, dense, tmp_path, translation_batch):
    out, flags = tmp_path / "moe.pt", GRANULAR[kind]
    assert main(["upcycle", str(dense), str(out), "--num-experts", "8", "--moe-freq", "1", *flags]) == 0
    sample = translation_batch(3, 7, 5)
    real = sample["net_input"]["prev_output_tokens"].ne(1)
    torch.testing.assert_close(logits(out, sample)[real], logits(dense, sample)[real], rtol=1e-5, atol=1e-5)
    granularity = int(flags[-1])
    assert read_checkpoint(str(out))["model"]["encoder.layers.0.fc1.moe.experts.weight_in"].shape == (8, 16, 24 // granularity)


ANOTHER_NUMBER = {  # flags of the first model, and of the second
    "switch": ("--router switch --num-experts 4", "--num-experts 8"),
    "sparsemixer": ("--router sparsemixer --num-experts 4", "--num-experts 12"),
    "hash": ("--router hash --num-experts 2", "--num-experts 4"),
    "topk": ("--router topk --moe-top-k 2 --num-experts 4", "--num-experts 8 --moe-top-k 4"),
}


@pytest.mark.parametrize("router", ANOTHER_NUMBER)
def test_copies_of_experts_compute_the_same(router, dense, tmp_path, translation_batch, capsys):
    made, first, second = (tmp_path / f"{name}.pt" for name in ("made", "first", "second"))
    before, after = ANOTHER_NUMBER[router]
    main(["upcycle", str(dense), str(made), "--moe-freq", "1", "--noise", "0.5", *before.split()])
    state = read_checkpoint(str(made))
    for name, value in state["model"].items():
        if name.endswith("gate.projection.weight"):
            torch.nn.init.normal_(value, std=0.5)  # a trained router has preferences
    torch.save(state, first)
    capsys.readouterr()
    assert main(["upcycle", str(first), str(second), *after.split()]) == 0
    assert "note" not in capsys.readouterr().out
    sample = translation_batch(3, 7, 5)
    real = sample["net_input"]["prev_output_tokens"].ne(1)
    torch.testing.assert_close(logits(second, sample)[real], logits(first, sample)[real], rtol=1e-3, atol=1e-4)
    assert read_checkpoint(str(second))["extra_state"]["ema"].keys() == state["extra_state"]["ema"].keys()


def test_a_model_with_experts_keeps_their_number_unless_another_is_given(dense, tmp_path, capsys):
    first, second = str(tmp_path / "first.pt"), str(tmp_path / "second.pt")
    main(["upcycle", str(dense), first, "--router", "topk", "--num-experts", "4", "--encoder-moe-layers", "0,1:6"])
    assert "3 layers of 4 or 6 experts" in capsys.readouterr().out
    main(["upcycle", first, second, "--moe-top-k", "2"])
    assert "3 layers of 4 or 6 experts" in capsys.readouterr().out
    settings = read_checkpoint(second)["cfg"]["model"]
    assert (settings.num_experts, settings.moe_top_k) == (4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["sparsemixer", "switch"])
def test_a_language_model_can_be_upcycled(router, dense_language_model, tmp_path, run_fairseq):
    data, dense = dense_language_model
    out = tmp_path / "moe.pt"
    main(["upcycle", str(dense), str(out), "--num-experts", "4", "--moe-freq", "1", "--router", router])
    words = torch.randint(4, 20, (3, 9))
    found, expected = (load(path)(words)[0] for path in (out, dense))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    evaluate = ["eval_lm", data, "--user-dir", USER_DIR, "--gen-subset", "valid", "--cpu", "--tokens-per-sample", 32, "--path"]
    losses = [run_fairseq(*evaluate, path)["loss"].item() for path in (out, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def dense_language_model(corpus, tmp_path_factory, run_fairseq):
    """(binarised text, a checkpoint of fairseq's own transformer_lm trained on it)."""
    folder = tmp_path_factory.mktemp("language_model")
    parts = "--trainpref", corpus.parent / "train.en", "--validpref", corpus.parent / "valid.en"
    run_fairseq("preprocess", "--only-source", *parts, "--destdir", folder / "bin", "--workers", 1)
    flags = (
        "--task language_modeling --arch transformer_lm_gpt2_tiny --decoder-layers 2 --decoder-embed-dim 16"
        " --decoder-output-dim 16 --decoder-input-dim 16 --decoder-ffn-embed-dim 24 --decoder-attention-heads 2"
        " --share-decoder-input-output-embed --optimizer adam --lr 0.01 --tokens-per-sample 32 --batch-size 4 --max-update 3"
        " --disable-validation --num-workers 0 --cpu"
    ).split()
    run_fairseq("train", folder / "bin", "--user-dir", USER_DIR, "--save-dir", folder / "run", *flags)
    return folder / "bin", folder / "run" / "checkpoint_last.pt"


@pytest.mark.slow
def test_an_upcycled_checkpoint_generates_and_trains_without_changes(corpus, dense, tmp_path):
    out = tmp_path / "moe.pt"
    main(["upcycle", str(dense), str(out), "--num-experts", "4", "--moe-freq", "1", "--router", "switch"])
    found, expected = ([line.split("\t") for line in runs.generate(corpus, path, tmp_path / path.stem)] for path in (out, dense))
    assert [(number, words) for number, _, words in found] == [(number, words) for number, _, words in expected]
    assert [float(score) for _, score, _ in found] == pytest.approx([float(score) for _, score, _ in expected], rel=1e-5)
    losses = runs.train(corpus, tmp_path / "run", "--finetune-from-model", out, updates=2)
    assert len(losses) == 2


def test_noise_makes_experts_differ_and_is_reproducible_by_seed(dense, tmp_path):
    weights = []
    for seed in (1, 1, 2):
        out = tmp_path / f"{len(weights)}.pt"
        main(["upcycle", str(dense), str(out), "--num-experts", "4", "--noise", "0.1", "--seed", str(seed)])
        weights.append(read_checkpoint(str(out))["model"]["encoder.layers.0.fc1.moe.experts.weight_in"].clone())
    original = read_checkpoint(str(dense))["model"]["encoder.layers.0.fc1.weight"].t()
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert ((weights[0] - original).std() / original.std()).item() == pytest.approx(0.1, rel=0.1)


def test_ema_copies_get_experts_too(dense, tmp_path):
    main(["upcycle", str(dense), str(tmp_path / "moe.pt"), "--num-experts", "4"])
    state = read_checkpoint(str(tmp_path / "moe.pt"))
    assert state["model"].keys() == state["extra_state"]["ema"].keys() == state["extra_state"]["ema_fp32_params"].keys()
    assert "last_optimizer_state" not in state


def test_an_arg_max_router_spreads_tokens_from_the_start(dense, tmp_path):
    gate = indifferent_gate(16, MoEOptions(router="switch", num_experts=4)).gate
    chosen = gate(torch.randn(200, 16)).expert_index.flatten().bincount(minlength=4)
    assert chosen.min() > 20


def test_a_router_that_weighs_tokens_unevenly_is_refused():
    @register_gate("uneven")
    class Uneven(Gate):
        def route(self, logits, padding_mask=None):
            return Routing(torch.zeros(len(logits), 1, dtype=torch.long), torch.rand(len(logits), 1))

    try:
        with pytest.raises(ConfigurationError, match="--router uneven weighs tokens differently"):
            indifferent_gate(16, MoEOptions(router="uneven"))
    finally:
        del GATES["uneven"]


def test_a_missing_weight_is_refused(dense):
    state = read_checkpoint(str(dense))
    model = _with_experts(state["cfg"]["model"], MoEOptions(router="switch", num_experts=4, moe_freq=1))
    weights = upcycle(state, MoEOptions(router="switch", num_experts=4, moe_freq=1))["model"]
    del weights["decoder.layers.0.fc1.moe.gate.projection.weight"]
    with pytest.raises(ConfigurationError, match=r"require moe.gate.projection.weight of shape \(4, 16\), .* provides none"):
        _require_fit(model, weights)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--router", "dense"], "--router dense has no experts"),
        (["--router", "nonsense"], "nonsense"),
        (["--noise", "-1"], "--noise -1.0 must be at least 0"),
        (["--noise", "nan"], "--noise nan must be at least 0 and finite; give 0 for none"),
        (["--noise", "inf"], "--noise inf must be at least 0 and finite; give 0 for none"),
        (["--seed", "-1"], "--seed -1 must be at least 0"),
        (["--seed", str(2**70)], r"must be at least 0 and below 2\*\*63"),
        (["--num-experts", "0"], "--num-experts 0 must be at least 1"),
        (["--router", "default_moe"], "--router default_moe adds running means of the experts' outputs"),
        (["--router", "expert_threshold"], "--router expert_threshold weighs tokens differently even if all experts are equal"),
        (["--granularity", "0"], "--granularity 0 must be at least 1"),
        (["--granularity", "5"], "--granularity 5 does not divide the 24 hidden units of the dense layers"),
        (["--granularity", "4", "--num-experts", "6"], "--granularity 4 does not divide the 6 experts of a layer"),
        (["--granularity", "2", "--expert-ffn-embed-dim", "24"], "--expert-ffn-embed-dim 24 contradicts --granularity 2, .* 12"),
        (
            ["--granularity", "2", "--router", "switch"],
            "--granularity 2 needs a router .*; use --router topk --moe-top-k 2, or a",
        ),
        (["--granularity", "2", "--router", "sparsemixer_v2"], "--granularity 2 needs a router that gives a token all 2 slices"),
        (["--granularity", "4", "--router", "topk", "--moe-top-k", "2"], "--granularity 4 needs a router"),
        (["--reinitialise", "nan"], "--reinitialise nan must be at least 0 and at most 1"),
        (["--reinitialise", "1.5"], "--reinitialise 1.5 must be at least 0 and at most 1"),
        (["--router", "remoe"], "--router remoe weighs tokens differently even if all experts are equal"),
    ],
)
def test_invalid_flags_give_a_one_line_error(flags, sentence, dense, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        main(["upcycle", str(dense), str(tmp_path / "moe.pt"), *flags])
    assert not (tmp_path / "moe.pt").exists()


def test_unsupported_checkpoints_give_a_one_line_error(dense, tmp_path):
    state = read_checkpoint(str(dense))
    name = str(tmp_path / "in.pt")
    for change, sentence in (
        ({"cfg": {**state["cfg"], "model": {"_name": "lstm"}}}, "is of the model lstm; upcycle supports transformer"),
        ({"cfg": None, "args": None}, "does not name its model"),
    ):
        torch.save({**state, **change}, name)
        with pytest.raises(SystemExit, match=sentence):
            main(["upcycle", name, str(tmp_path / "moe.pt")])


def test_the_input_is_never_overwritten_and_an_unwritable_output_is_named(dense, tmp_path):
    source, link, pipe = tmp_path / "dense.pt", tmp_path / "link.pt", tmp_path / "pipe.pt"
    shutil.copy(dense, source)
    link.symlink_to(source)
    os.mkfifo(pipe)
    before = source.read_bytes()
    for out, sentence in (
        (source, "dense.pt would be overwritten, but it is an input; choose another OUT"),
        (link, "link.pt would be overwritten, but it is an input"),
        (tmp_path / "gone" / "moe.pt", "moe.pt cannot be written, as the folder .*gone does not exist; create it first"),
        (pipe, "pipe.pt is a pipe or device, not a file"),
        ("/dev/full", "/dev/full is a pipe or device, not a file"),
        ("", "the name of the checkpoint to write is empty"),
    ):
        with pytest.raises(SystemExit, match=sentence) as error:
            main(["upcycle", str(source), str(out), "--num-experts", "2"])
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="pipe.pt is a pipe or device; name a checkpoint file"):
        main(["upcycle", str(pipe), str(tmp_path / "moe.pt")])
    assert source.read_bytes() == before and link.is_symlink() and pipe.is_fifo() and not (tmp_path / "moe.pt").exists()


def test_invalid_weights_and_settings_give_a_one_line_error(dense, tmp_path):
    state = read_checkpoint(str(dense))
    name = str(tmp_path / "in.pt")
    odd = {"encoder.layers.0.fc1.weight": torch.ones(3)}
    changes = [{"model": {**state["model"], **odd}}, {"model": odd}, {"cfg": {"model": 5}}, {"cfg": 5}, {"args": 5, "cfg": None}]
    for change in changes:
        torch.save({**state, **change}, name)
        with pytest.raises(SystemExit, match="fairseq-sparsemixer: .*") as error:
            main(["upcycle", name, str(tmp_path / "moe.pt")])
        assert isinstance(error.value, ConfigurationError) and "\n" not in str(error.value)
    assert not (tmp_path / "moe.pt").exists()


def test_a_model_with_experts_keeps_its_other_flags(dense, tmp_path):
    first, out = str(tmp_path / "first.pt"), str(tmp_path / "out.pt")
    main(["upcycle", str(dense), first, "--num-experts", "4", "--router", "switch"])
    for flags, sentence in (
        (["--num-experts", "4"], "first.pt already has experts, 4 a layer; give another --num-experts"),
        (["--router", "gshard"], "--router gshard is not that of the checkpoint, switch; .* keeps all flags but --num-experts"),
        (
            ["--num-experts", "8", "--router", "sparsemixer"],
            "--router sparsemixer is not that of the checkpoint, switch",
        ),  # the default
        (["--granularity", "2"], "--granularity 2 cuts dense layers, but this one has experts; leave it out"),
        (["--moe-top-k", "2"], "--moe-top-k 2 does not work with --router switch"),
        (["--noise", "-1"], "--noise -1.0 must be at least 0"),
    ):
        with pytest.raises(SystemExit, match=sentence) as error:
            main(["upcycle", first, out, *flags])
        assert "\n" not in str(error.value) and not os.path.exists(out)


@pytest.mark.slow
def test_a_model_with_more_experts_trains_and_one_with_fewer_says_what_changes(corpus, dense, tmp_path, capsys):
    first, more, fewer = (str(tmp_path / f"{name}.pt") for name in ("first", "more", "fewer"))
    main(["upcycle", str(dense), first, "--num-experts", "4", "--moe-freq", "1", "--router", "switch"])
    main(["upcycle", first, more, "--num-experts", "8", "--reinitialise", "0.5"])
    flags = ["--num-experts", "8", "--finetune-from-model", more]
    assert len(runs.train(corpus, tmp_path / "run", *flags, updates=2)) == 2
    capsys.readouterr()
    main(["upcycle", first, fewer, "--num-experts", "2"])
    printed = capsys.readouterr().out
    assert printed.count("note: ") == 3 and "note: encoder.layers.0 does not compute the same" in printed
    kept = read_checkpoint(fewer)["model"]["encoder.layers.0.fc1.moe.experts.weight_in"]
    assert torch.equal(kept, read_checkpoint(first)["model"]["encoder.layers.0.fc1.moe.experts.weight_in"][[0, 2]])
