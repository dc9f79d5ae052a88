"""`fairseq-sparsemixer convert`: checkpoints of microsoft/SparseMixer's example give the same results after conversion.

The reference is fairseq's own transformer. Its even layers compute the formulas of the example's routers, see below, and its
state dict has the example's names.
"""

import copy
import json
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import runs
import torch
from fairseq import checkpoint_utils
from fairseq.models.transformer import TransformerModel, transformer_legacy
from torch import nn

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint

E, M, H, JITTER = 4, 16, 24, 0.2
SIZES = dict(
    encoder_layers=2, decoder_layers=1, encoder_embed_dim=M, decoder_embed_dim=M, encoder_ffn_embed_dim=H,
    decoder_ffn_embed_dim=H, encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0, attention_dropout=0.0,
    activation_dropout=0.0,
)  # fmt: skip
TRAIN_ON = f"--num-experts {E} --moe-freq 2 --jitter-eps {JITTER} --router-bias --share-all-embeddings".split()


class Route(nn.ModuleList):
    """fc1: E Linears M -> H. Called by fairseq's layer, it runs the whole feed-forward part."""

    def forward(self, x):
        return self.layer[0].feed_forward(x)


class Identity(nn.ModuleList):
    """fc2: E Linears H -> M, applied by fc1."""

    def forward(self, x):
        return x


def give_experts(layer, router):
    """Turn a layer of fairseq's transformer into the example's, which scales the arg-max by its probability at inference."""

    def feed_forward(x):  # [T, B, M]
        logits = layer.gating_network(x)  # [T, B, E]
        top, chosen = logits.max(-1, keepdim=True)
        if router == "SparseMixer":  # the probability among the experts that jitter could make the arg-max
            logits = logits.masked_fill(top - logits > 2 * JITTER * torch.maximum(logits.abs(), top), -1e9)
        weight = logits.softmax(-1).gather(-1, chosen)
        each = torch.stack([fc2(torch.relu(fc1(x))) for fc1, fc2 in zip(layer.fc1, layer.fc2)], -1)  # [T, B, M, E]
        y = weight * each.gather(-1, chosen.unsqueeze(-2).expand(*x.shape, 1)).squeeze(-1)
        return y * layer.router.omega if router == "SparseMixer" else y

    layer.fc1, layer.fc2 = Route(nn.Linear(M, H) for _ in range(E)), Identity(nn.Linear(H, M) for _ in range(E))
    layer.fc1.layer, layer.feed_forward, layer.activation_fn = [layer], feed_forward, lambda x: x
    layer.router = nn.Module()
    if router == "SparseMixer":
        layer.router.omega = nn.Parameter(1 + torch.randn(M) / 4)


def arguments(router, **flags):
    args = Namespace(arch="switch_transformer", _name="switch_transformer", **{**SIZES, "share_all_embeddings": True, **flags})
    args.num_experts, args.router, args.jitter_eps, args.load_balancing = E, router, JITTER, True
    transformer_legacy.tiny_architecture(args)
    return args


def reference(args, task):
    model = TransformerModel.build_model(copy.deepcopy(args), task)
    for stack in (model.encoder, model.decoder):
        for index, layer in enumerate(stack.layers):
            norm = layer.final_layer_norm
            del layer.final_layer_norm  # registered before the gate, as in the example
            if index % 2 == 0:
                give_experts(layer, args.router)
            layer.final_layer_norm, layer.gating_network = norm, nn.Linear(M, E)
            if index % 2 == 0:
                layer.router = layer._modules.pop("router")
                nn.init.normal_(layer.gating_network.weight, std=0.5)
                nn.init.normal_(layer.gating_network.bias)
    return model.eval()


def step(model, optimizer, sample):
    """Make one update; the loss is a random combination of the logits of non-padding tokens."""
    weight = torch.randn(24, generator=torch.Generator().manual_seed(3))
    logits = model(**sample["net_input"])[0]
    optimizer.zero_grad()
    (logits * weight)[real(sample)].square().mean().backward()
    optimizer.step()


def real(sample):
    return sample["net_input"]["prev_output_tokens"].ne(1)


def flattened(state, parameters):
    """An optimizer's state as under fairseq's --fp16: one entry for all parameters in order, with zeros for missing states."""
    sizes = enumerate(parameters)
    entries = [state["state"].get(i) or {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")} for i, p in sizes]
    flat = {key: torch.cat([entry[key].flatten() for entry in entries]) for key in ("exp_avg", "exp_avg_sq")}
    group = {**state["param_groups"][0], "params": [0]}
    return {"state": {0: {"step": 2, **flat}}, "param_groups": [group], "loss_scale": 4.0}


@pytest.fixture
def theirs(corpus, translation_task, translation_batch, tmp_path):
    """theirs(router, **flags) -> (model, optimizer, checkpoint's path) after two Adam updates, in the example's format."""

    def write(router="SparseMixer", flat=False, **flags):
        args = arguments(router, **flags)
        model = reference(args, translation_task)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for lengths in ((3, 5), (8, 2, 4)):
            step(model, optimizer, translation_batch(*lengths))
        task = {"_name": "translation_switch", "data": str(corpus), "source_lang": "de", "target_lang": "en", "gumbel": False}
        history = {"criterion_name": "CrossEntropyCriterion", "optimizer_name": "FairseqAdam", "num_updates": 2}
        meters = [(10, "loss", "AverageMeter", {"val": 1, "sum": 1, "count": 1, "round": 3})]
        meters += [(790, "wall", "StopwatchMeter", {"sum": 0, "n": 0, "round": 0})]  # required by fairseq-train
        meters += [
            (10, name, "AverageMeter", {"val": torch.ones(2, E), "sum": 1, "count": 1}) for name in ("load", "balance_loss")
        ]
        cfg = {"model": args, "task": task, "criterion": {"_name": "cross_entropy"}, "common": {"user_dir": "moe"}}
        state = {
            "args": None,
            "cfg": {**cfg, "distributed_training": {"distributed_world_size": 1}},
            "model": model.state_dict(),
            "criterion": None,
            "optimizer_history": [{**history, "lr_scheduler_state": {"best": None}}],
            "task_state": {},
            "extra_state": {
                "train_iterator": {"epoch": 1, "iterations_in_epoch": 2, "shuffle": True, "version": 2},
                "metrics": OrderedDict(default=meters),
                "ema": model.state_dict(),
            },
            "last_optimizer_state": flattened(optimizer.state_dict(), model.parameters()) if flat else optimizer.state_dict(),
        }
        torch.save(state, tmp_path / "theirs.pt")
        return model, optimizer, tmp_path / "theirs.pt"

    return write


def converted(path: Path) -> Path:
    assert main(["convert", str(path), str(path.with_name("ours.pt"))]) == 0
    return path.with_name("ours.pt")


def load(path: Path) -> nn.Module:
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    assert type(task).__name__ == "TranslationTask"
    return model.eval()


@pytest.mark.parametrize("router", ["SparseMixer", "SwitchGate"])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        dict(encoder_normalize_before=True, decoder_normalize_before=True, share_all_embeddings=False, encoder_learned_pos=True),
    ],
)
def test_the_converted_model_gives_the_same_outputs(router, flags, theirs, translation_batch):
    model, _, path = theirs(router, **flags)
    sample = translation_batch(3, 9, 5, 1)
    expected = model(**sample["net_input"])[0]
    found = load(converted(path))(**sample["net_input"])[0]
    torch.testing.assert_close(found[real(sample)], expected[real(sample)], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for layer in (model.encoder.layers[0], model.decoder.layers[0]):
            layer.gating_network.bias.zero_()
    without_bias = model(**sample["net_input"])[0]
    assert (without_bias - expected)[real(sample)].abs().max() > 1e-3  # the compared outputs depend on the bias


@pytest.mark.parametrize("flat", [False, True])
def test_the_next_updates_equal_those_of_the_original_model(flat, theirs, translation_batch, capsys):
    model, optimizer, path = theirs(flat=flat)
    ours = load(converted(path))
    assert "optimizer state kept" in capsys.readouterr().out
    state = read_checkpoint(str(path.with_name("ours.pt")))
    ours_optimizer = torch.optim.Adam(ours.parameters())
    loaded = copy.deepcopy(state["last_optimizer_state"])
    for entry in loaded["state"].values():
        entry["step"] = torch.as_tensor(float(entry["step"]))  # fairseq's Adam uses numbers, torch's uses tensors
    ours_optimizer.load_state_dict(loaded)
    for lengths in ((6, 2), (3, 3)):
        sample = translation_batch(*lengths)
        step(model, optimizer, sample)
        step(ours, ours_optimizer, sample)
    sample = translation_batch(4, 7)
    expected = model(**sample["net_input"])[0]
    found = ours(**sample["net_input"])[0]
    torch.testing.assert_close(found[real(sample)], expected[real(sample)], rtol=1e-4, atol=1e-4)
    names = [name for name, _ in ours.named_parameters()]
    assert state["expert_parallel"]["optimizer"] == [i for i, name in enumerate(names) if ".experts." in name]
    assert state["optimizer_history"][-1]["criterion_name"] == "MoECrossEntropyCriterion"
    assert ("loss_scale" in state["last_optimizer_state"]) == flat


@pytest.mark.slow
@pytest.mark.parametrize("router, ours", [("SparseMixer", "sparsemixer"), ("SwitchGate", "switch")])
def test_the_converted_checkpoint_generates_and_resumes(router, ours, theirs, corpus, tmp_path, capsys):
    path = converted(theirs(router)[2])
    flags = f"--router {ours} --num-experts {E} --moe-freq 2 --jitter-eps {JITTER} --router-bias"
    assert flags in capsys.readouterr().out
    assert len(runs.generate(corpus, path, tmp_path / "generated")) == 8
    losses = runs.train(corpus, tmp_path / "run", "--restore-file", path, "--router", ours, *TRAIN_ON, updates=4)
    assert len(losses) == 2  # two of the four updates were made before


def test_ema_copies_are_renamed_and_the_examples_meters_removed(theirs):
    state = read_checkpoint(str(converted(theirs()[2])))
    assert state["extra_state"]["ema"].keys() == state["model"].keys()
    assert [meter[1] for meter in state["extra_state"]["metrics"]["default"]] == ["loss", "wall"]
    assert state["cfg"]["common"]["user_dir"] is None and state["cfg"]["task"]["_name"] == "translation"
    assert not {"gumbel", "num_experts"} & state["cfg"]["task"].keys()
    assert not any("gating_network" in name for name in state["model"])


def test_an_optimizer_state_that_cannot_be_mapped_is_dropped_with_the_reason(theirs, tmp_path, capsys):
    model, _, path = theirs()
    state = torch.load(path, weights_only=True)
    steps = state["last_optimizer_state"]["state"]
    index = [name for name, _ in model.named_parameters()].index("encoder.layers.0.fc1.2.weight")
    steps[index]["step"] = steps[index]["step"] - 1  # an expert without tokens in one update
    torch.save(state, path)
    figures = tmp_path / "figures.json"
    main(["convert", str(path), str(tmp_path / "ours.pt"), "--json", str(figures)])
    reason = "the parameters that became encoder.layers.0.fc1.moe.experts.weight_in differ in step"
    assert f"optimizer state left out: {reason}" in capsys.readouterr().out
    assert json.loads(figures.read_text())["optimizer_state"] is False
    assert "last_optimizer_state" not in read_checkpoint(str(tmp_path / "ours.pt"))


def test_a_checkpoint_without_optimizer_state_can_be_converted(theirs, tmp_path, capsys):
    path = theirs()[2]
    state = torch.load(path, weights_only=True)
    del state["last_optimizer_state"]
    torch.save(state, path)
    assert main(["convert", str(path), str(tmp_path / "ours.pt")]) == 0
    assert "left out: the checkpoint has none" in capsys.readouterr().out
    load(tmp_path / "ours.pt")
    with pytest.raises(SystemExit, match="theirs.pt would be overwritten, but it is an input; choose another OUT"):
        main(["convert", str(path), str(path)])


def changed(state, **options):
    model = Namespace(**{**vars(state["cfg"]["model"]), **options})
    return {"cfg": {**state["cfg"], "model": model}}


def without(state, name):
    return {"model": {key: value for key, value in state["model"].items() if key != name}}


@pytest.mark.parametrize("change, sentence", [
    (lambda s: {"model": {"encoder.layers.0.fc1.moe.experts.weight_in": torch.ones(2)}}, "is already one of fairseq-sparsemixer"),
    (lambda s: {"model": {"decoder.layers.1.moe_layer.gate.wg.weight": torch.ones(2)}}, "is from fairseq's moe branch, which"),
    (lambda s: {"model": {"encoder.layers.0.fc1.weight": torch.ones(2)}}, "has no experts as .*; fairseq-sparsemixer upcycle"),
    (lambda s: {"cfg": None}, "is of the model None; convert supports microsoft/SparseMixer's switch_transformer"),
    (lambda s: changed(s, arch="thor"), "is of the model thor"),
    (lambda s: changed(s, router="Top2Gate"), "--router Top2Gate is unknown; convert supports SparseMixer and SwitchGate"),
    (lambda s: changed(s, router="SwitchGate"), "has encoder.layers.0.router.omega, which .* not have with the same arguments"),
    (lambda s: changed(s, num_experts=5), r"gating_network.weight is of \(4, 16\), .* require \(5, 16\)"),
    (lambda s: changed(s, num_experts="four"), "--num-experts four is not a number; use an unchanged checkpoint"),
    (lambda s: changed(s, jitter_eps=None), "--jitter-eps None is not a number; use an unchanged checkpoint"),
    (lambda s: changed(s, encoder_ffn_embed_dim=8), r"fc1.0.weight is of \(24, 16\), .* arguments require \(8, 16\)"),
    (lambda s: without(s, "decoder.layers.0.fc2.3.bias"), "decoder.layers.0.fc2.3.bias is missing, but its own arguments"),
    (lambda s: without(s, "encoder.layers.0.gating_network.bias"), "encoder.layers.0.gating_network.bias is missing"),
    (lambda s: without(s, "encoder.embed_tokens.weight"), "has no encoder.embed_tokens.weight; it is not a complete model"),
])  # fmt: skip
def test_any_other_file_gives_a_one_line_error(change, sentence, theirs, tmp_path):
    path = theirs()[2]
    state = torch.load(path, weights_only=True)
    torch.save({**state, **change(state)}, path)
    with pytest.raises(SystemExit, match=f"^fairseq-sparsemixer: the checkpoint.*{sentence}") as caught:
        main(["convert", str(path), str(tmp_path / "ours.pt")])
    assert "\n" not in caught.value.code and not (tmp_path / "ours.pt").exists()


def test_arguments_of_the_wrong_type_give_a_one_line_error(theirs, tmp_path):
    path = theirs()[2]
    state = torch.load(path, weights_only=True)
    odd = [changed(state, encoder_layers=[1]), changed(state, encoder_embed_dim="wide"), {"cfg": {"model": 5}}, {"cfg": [1]}]
    for change in odd:
        torch.save({**state, **change}, path)
        with pytest.raises(SystemExit, match="^fairseq-sparsemixer: ") as caught:
            main(["convert", str(path), str(tmp_path / "ours.pt")])
        assert "\n" not in caught.value.code and not (tmp_path / "ours.pt").exists()
