"""`fairseq-sparsemixer convert` of checkpoints of fairseq's branches `moe` and `nllb`: the converted model computes the same.

The reference is fairseq's own transformer, whose chosen layers compute the branch's MoE layer from its formulas, in float64.
Its state dict has the branch's names, and is written as the branch writes it: one file for each rank and a shared one.
"""

import argparse
import re
from pathlib import Path

import pytest
import runs
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import GenerationConfig
from fairseq.models.transformer import TransformerModel, transformer_legacy
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from torch import nn

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.moe.layer import moe_layers

E, M, H = 4, 16, 24
STACK = {"layers": 4, "embed_dim": M, "ffn_embed_dim": H, "attention_heads": 2, "normalize_before": True}
LAYOUTS = {"W = E": (4, ""), "E / W = 2": (2, ""), "W = 2 E": (8, ""), "FSDP": (4, "-shard{}")}
ROUTING = {"moe_expert_count": E, "moe_second_expert_policy": "all", "moe_eval_capacity_token_fraction": 1.0}


class BranchLayer(nn.Module):
    """The MoE layer of the branch at evaluation, with a capacity of all tokens."""

    def __init__(self, args):
        super().__init__()
        self.gate, self.experts = nn.Module(), nn.ModuleList()
        self.gate.wg = nn.Linear(M, E, bias=False)
        for _ in range(E):
            expert = nn.Module()
            expert.fc1, expert.fc2 = nn.Linear(M, H), nn.Linear(H, M)
            self.experts.append(expert)
        self.top1 = getattr(args, "moe_top1_expert", False)
        self.eom, self.kept = getattr(args, "moe_eom", 0), 1 - getattr(args, "moe_fom", 0)

    def forward(self, x):
        return (self.routed(x.double()) * self.kept).to(x.dtype)

    def routed(self, y):
        gates = (y @ self.gate.wg.weight.double().t()).softmax(-1)
        weight, chosen = gates.topk(1 if self.top1 else 2, -1)
        if not self.top1:
            weight = weight / weight.sum(-1, keepdim=True)
        weights = torch.zeros_like(gates).scatter(-1, chosen, weight)
        out = torch.zeros_like(y)
        for index, expert in enumerate(self.experts):
            out += weights[..., index, None] * feed_forward(y, expert.fc1, expert.fc2)
        return out * (1 - self.eom)


def feed_forward(y, fc1, fc2):
    hidden = torch.relu(y @ fc1.weight.double().t() + fc1.bias.double())
    return hidden @ fc2.weight.double().t() + fc2.bias.double()


class BranchCMR(nn.Module):
    """The branch's layer of --moe-cmr at evaluation; it holds moe_layer a second time, and not the dense layer."""

    def __init__(self, moe_layer):
        super().__init__()
        self.moe_layer, self.gate = moe_layer, nn.Module()
        self.gate.wg = nn.Linear(M, 1)
        self.register_buffer("lang_idx", torch.arange(3))

    def run(self, x, fc1, fc2):
        y = x.double()
        g = torch.sigmoid(y @ self.gate.wg.weight.double().t() + self.gate.wg.bias.double())
        out = feed_forward(y, fc1, fc2) * (1 - g) + self.moe_layer.routed(y) * g
        return (out * self.moe_layer.kept).to(x.dtype)


class Held(nn.Linear):
    """A Linear of the state dict, in whose place fairseq's layer calls something else."""

    def forward(self, x):
        return self.call(x)


def give_cmr(layer, cmr):
    layer.fc1, layer.fc2, layer.cmr_layer = Held(M, H), Held(H, M), cmr
    layer.fc1.call, layer.fc2.call = lambda x: cmr.run(x, layer.fc1, layer.fc2), lambda x: x


def give_experts(args, stack, name):
    """Put the branch's layer in every freq-th layer of the stack, the last of each freq layers."""
    freq = max(getattr(args, f"{name}_moe_freq", 0), getattr(args, "moe_freq", 0))
    for number, layer in enumerate(stack.layers, start=1):
        if freq and number % freq == 0:
            del layer.fc1, layer.fc2
            layer.moe_layer, layer.activation_fn = BranchLayer(args), lambda x: x
            if getattr(args, "moe_cmr", False):
                give_cmr(layer, BranchCMR(layer.moe_layer))
                continue
            layer.__dict__.update(fc1=layer.moe_layer, fc2=lambda x: x)  # called by fairseq's layer, not in the state dict


def translation_model(task, **flags):
    sizes = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in STACK.items()}
    values = {"arch": "transformer", "_name": "transformer", "share_all_embeddings": True}
    args = argparse.Namespace(**{**values, **sizes, **ROUTING, **flags})
    transformer_legacy.base_architecture(args)
    model = TransformerModel.build_model(args, task)
    give_experts(args, model.encoder, "encoder")
    give_experts(args, model.decoder, "decoder")
    return args, model.eval()


def language_model(task, **flags):
    sizes = {f"decoder_{name}": value for name, value in STACK.items()}
    values = {"arch": "transformer_lm_gpt", "_name": "transformer_lm_gpt", "tokens_per_sample": 32, "max_target_positions": 32}
    args = argparse.Namespace(share_decoder_input_output_embed=True, **{**values, **sizes, **ROUTING, **flags})
    model = TransformerLanguageModel.build_model(TransformerLanguageModelConfig.from_namespace(args), task)
    give_experts(args, model.decoder, "decoder")
    return args, model.eval()


def write_set(folder, args, model, ranks=4, shard="", task="translation", criterion=None, **of_task):
    """The files of `ranks` ranks, as the branch writes them; returns the name of the set."""
    cfg = {"model": args, "task": {"_name": task, **of_task, "moe_option": 1}, "common": {"user_dir": None, "is_moe": True}}
    cfg["criterion"] = {"_name": "moe_cross_entropy", **(criterion or {})}
    state = {"args": None, "cfg": {**cfg, "distributed_training": {"distributed_world_size": ranks}}}
    state.update(optimizer_history=[{"num_updates": 3, "lr_scheduler_state": {}}], extra_state={}, task_state={})
    state["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    weights, local = model.state_dict(), max(1, E // ranks)
    shared = {name: value for name, value in weights.items() if "expert" not in name}
    torch.save({**state, "model": shared}, folder / f"m-shared{shard.format(0)}.pt")
    for rank in range(ranks):
        own = {}
        for name, value in weights.items():
            found = re.search(r"experts\.(\d+)\.", name)
            if found and int(found[1]) // local == rank % (E // local):
                own[name.replace(found[0], f"experts.{int(found[1]) % local}.")] = value.clone()
        torch.save({**state, "model": own}, folder / f"m-rank-{rank}{shard.format(rank)}.pt")
    return folder / "m.pt"


def convert(source: Path) -> Path:
    assert main(["convert", str(source), str(source.with_name("ours.pt"))]) == 0
    return source.with_name("ours.pt")


def load(path, task):
    (model,), _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
    return model.eval()


def outputs(model, sample, pad=1):
    """The logits [tokens, words] of all tokens but the padding, which ours does not route."""
    with torch.no_grad():
        return model(**sample["net_input"])[0][sample["target"] != pad]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top1", [True, False], ids=["top-1", "top-2"])
def test_a_converted_translation_model_gives_the_same_logits(layout, top1, translation_task, translation_batch, tmp_path):
    args, model = translation_model(translation_task, encoder_moe_freq=2, decoder_moe_freq=4, moe_freq=0, moe_top1_expert=top1)
    path = convert(write_set(tmp_path, args, model, *LAYOUTS[layout]))
    sample = translation_batch(5, 3, 7)
    ours = load(path, translation_task)
    assert type(ours).__name__ == "TransformerMoEModel"
    assert_equal(outputs(ours, sample), outputs(model, sample))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top1", [True, False], ids=["top-1", "top-2"])
def test_a_converted_language_model_gives_the_same_logits(
    layout, top1, language_modeling_task, language_modeling_batch, tmp_path
):
    args, model = language_model(language_modeling_task, moe_freq=2, moe_top1_expert=top1)
    path = convert(write_set(tmp_path, args, model, *LAYOUTS[layout], task="language_modeling"))
    sample = language_modeling_batch(5, 3, 7)
    ours = load(path, language_modeling_task)
    assert type(ours).__name__ == "TransformerLanguageModelMoE"
    assert_equal(outputs(ours, sample), outputs(model, sample))


@pytest.mark.parametrize("kind", ["translation", "language model"])
def test_masking_of_outputs_becomes_our_flags_and_changes_no_weight(
    kind, translation_task, translation_batch, language_modeling_task, language_modeling_batch, tmp_path, capsys
):
    flags = dict(moe_freq=2, moe_eom=0.2, moe_fom=0.5, moe_local_drop=0.3)
    if kind == "translation":
        task, sample, (args, model) = translation_task, translation_batch(5, 3, 7), translation_model(translation_task, **flags)
    else:
        task, sample = language_modeling_task, language_modeling_batch(5, 3, 7)
        args, model = language_model(task, **flags)
    path = convert(write_set(tmp_path, args, model))
    assert " --moe-eom 0.2 --moe-fom 0.5 --moe-gating-dropout 0.3," in capsys.readouterr().out
    ours = load(path, task)
    assert_equal(outputs(ours, sample), outputs(model, sample))
    theirs = model.decoder.layers[1].moe_layer.experts[2].fc2.weight
    assert torch.equal(ours.decoder.layers[1].fc1.moe.experts.weight_out[2], theirs.t())
    assert all((layer.eom, layer.fom) == (0.2, 0.5) for layer in moe_layers(ours))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("top1", [True, False], ids=["top-1", "top-2"])
def test_conditional_routing_is_carried_over(layout, top1, translation_task, translation_batch, tmp_path, capsys):
    flags = dict(moe_freq=2, moe_top1_expert=top1, moe_eom=0.2, moe_fom=0.1, moe_cmr=True, cmr_gate_drop=0.4)
    args, model = translation_model(translation_task, **flags)
    assert "encoder.layers.1.cmr_layer.moe_layer.experts.0.fc1.weight" in model.state_dict()
    path = convert(
        write_set(tmp_path, args, model, *LAYOUTS[layout], criterion={"cmr_gate_loss_p": 0.7, "cmr_gate_loss_wt": 0.05})
    )
    assert " --moe-cmr --moe-cmr-gate-dropout 0.4 --moe-cmr-budget 0.7 --moe-cmr-loss-weight 0.05," in capsys.readouterr().out
    sample = translation_batch(5, 3, 7)
    ours = load(path, translation_task)
    assert_equal(outputs(ours, sample), outputs(model, sample))
    assert all(layer.cmr.gate_dropout == 0.4 for layer in moe_layers(ours))


def test_conditional_routing_of_a_language_model_is_carried_over(
    language_modeling_task, language_modeling_batch, tmp_path, capsys
):
    args, model = language_model(language_modeling_task, moe_freq=2, moe_cmr=True)
    path = convert(write_set(tmp_path, args, model, task="language_modeling"))
    assert " --moe-cmr-budget 1 --moe-cmr-loss-weight 0," in capsys.readouterr().out  # the branch's defaults
    sample = language_modeling_batch(5, 3, 7)
    assert_equal(outputs(load(path, language_modeling_task), sample), outputs(model, sample))


def test_the_converted_file_holds_only_data_and_generates(translation_task, translation_batch, tmp_path):
    path = convert(write_set(tmp_path, *translation_model(translation_task, moe_freq=2)))
    state = torch.load(path, weights_only=True)
    assert "last_optimizer_state" not in state and state["cfg"]["model"].encoder_moe_layers == "1,3"
    model = load(path, translation_task)
    generator = translation_task.build_generator([model], GenerationConfig(beam=2, max_len_b=5))
    (hypotheses, _) = translation_task.inference_step(generator, [model], translation_batch(4, 6))
    assert len(hypotheses) == 2 and len(hypotheses[0]["tokens"]) > 0


@pytest.mark.slow
def test_fairseqs_commands_generate_from_the_converted_file_and_train_on(corpus, translation_task, tmp_path, capsys):
    args, model = translation_model(translation_task, moe_freq=2)
    path = convert(write_set(tmp_path, args, model, data=str(corpus), source_lang="de", target_lang="en"))
    (printed,) = re.findall("to continue training: (.*), and the same model sizes", capsys.readouterr().out)
    assert len(runs.generate(corpus, path, tmp_path / "generated")) == 8
    sizes = "--encoder-layers 4 --decoder-layers 4 --encoder-normalize-before --decoder-normalize-before --share-all-embeddings"
    losses = runs.train(corpus, tmp_path / "run", *printed.split(), *sizes.split(), "--restore-file", path, updates=2, moe=False)
    assert len(losses) == 2  # from update 0, as there is no optimizer state


def test_the_output_says_what_is_left_out_and_the_flags(translation_task, tmp_path, capsys):
    flags = dict(moe_second_expert_policy="random", moe_normalize_gate_prob_before_dropping=True)
    flags.update(moe_batch_prioritized_routing=True, moe_eval_capacity_token_fraction=0.25)
    convert(write_set(tmp_path, *translation_model(translation_task, moe_freq=2, **flags)))
    out = capsys.readouterr().out
    assert "4 layers of 4 experts, router gshard" in out and "optimizer state left out: " in out
    assert "note: at evaluation the second expert is the second most probable" in out
    assert "note: at evaluation no token is dropped" in out and "--moe-eval-capacity-token-fraction 0.25" in out
    assert (
        "--arch transformer_moe --router gshard --num-experts 4 --encoder-moe-layers 1,3 --decoder-moe-layers 1,3"
        " --capacity-factor 1 --capacity-policy batch --second-expert-policy random --normalise-before-dropping"
    ) in out


def rewrite(path, change):
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def rename(name):
    return lambda state: state["model"].update({name: torch.ones(2)})


REFUSALS = {  # file to change: (how, or None to remove it, the sentence)
    "missing rank": ("m-rank-2.pt", None, r"files of the checkpoint are missing: .*m-rank-2\.pt"),
    "missing first rank": ("m-rank-0.pt", None, r"files of the checkpoint are missing: .*m-rank-0\.pt"),
    "missing shared": ("m-shared.pt", None, r"files of the checkpoint are missing: .*m-shared\.pt"),
    "flat": ("m-rank-0.pt", lambda s: s.update(shard_metadata={}), "flat shards of --use-sharded-state"),
    "flat names": ("m-shared.pt", rename("decoder.layers.0.flat_param_0"), "flat shards of --use-sharded-state"),
    "CMR": ("m-shared.pt", rename("encoder.layers.1.cmr_layer.gate.wg.weight"), "but its arguments lack --moe-cmr"),
    "EOM": ("m-rank-0.pt", lambda s: setattr(s["cfg"]["model"], "moe_eom", 1.0), "--moe-eom 1.0 must be at least 0"),
    "BASE": ("m-shared.pt", rename("decoder.layers.1.expert_centroids"), "has BASE layers"),
    "unknown": ("m-shared.pt", rename("decoder.layers.1.attn_ln.weight"), "has decoder.layers.1.attn_ln.weight, which"),
    "gate": ("m-shared.pt", lambda s: s["model"].pop("decoder.layers.1.moe_layer.gate.wg.weight"), "gate.wg.weight is missing"),
    "expert": ("m-rank-3.pt", lambda s: s["model"].popitem(), "m-rank-3.pt has 15 tensors of experts, not 16"),
    "shape": (
        "m-rank-3.pt",
        lambda s: s["model"].update({"encoder.layers.1.moe_layer.experts.0.fc1.bias": torch.ones(2)}),
        "unlike its arguments",
    ),
    "alibi": ("m-rank-0.pt", lambda s: setattr(s["cfg"]["model"], "alibi", True), "was trained with --alibi"),
    "model": ("m-rank-0.pt", lambda s: setattr(s["cfg"]["model"], "arch", "lstm"), "of the model lstm"),
    "count": (
        "m-rank-0.pt",
        lambda s: setattr(s["cfg"]["model"], "moe_expert_count", "x"),
        "--moe-expert-count x is not a number",
    ),
    "no count": (
        "m-rank-0.pt",
        lambda s: setattr(s["cfg"]["model"], "moe_expert_count", None),
        "own arguments are not possible: --num-experts 0 must be",
    ),
    "no layer": ("m-rank-0.pt", lambda s: setattr(s["cfg"]["model"], "moe_freq", -2), "not possible: the flags leave no layer"),
    "heads": ("m-rank-0.pt", lambda s: setattr(s["cfg"]["model"], "scale_heads", True), "was trained with --scale-heads"),
    "ours": ("m-rank-0.pt", lambda s: s.update(expert_parallel={"size": 4, "index": 0}), "already one of fairseq-sparsemixer"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_converted_is_refused_in_one_sentence(case, translation_task, tmp_path):
    name, change, sentence = REFUSALS[case]
    source = write_set(tmp_path, *translation_model(translation_task, moe_freq=2))
    (tmp_path / name).unlink() if change is None else rewrite(tmp_path / name, change)
    with pytest.raises(SystemExit, match=f"^fairseq-sparsemixer: .*{sentence}") as caught:
        convert(source)
    assert str(caught.value).count("\n") == 0 and not source.with_name("ours.pt").exists()


@pytest.mark.parametrize("combine, weight", [("average", 0.02), ("sum", 0.08), (None, 0.02)])  # over 4 layers with experts
def test_commands_can_build_the_criterion_with_the_weights_of_their_losses(combine, weight, translation_task, tmp_path, capsys):
    theirs = dict(_name="moe_label_smoothed_cross_entropy", label_smoothing=0.1, sentence_avg=False, moe_cmr_xgpu=False)
    theirs.update(moe_gate_loss_wt=0.08, moe_gate_loss_combine_method=combine, cmr_gate_loss_p=0.7, cmr_gate_loss_wt=0.05)
    args, model = translation_model(translation_task, moe_freq=2, moe_cmr=True)
    path = convert(write_set(tmp_path, args, model, criterion=theirs))
    flags = f" --moe-balance-loss-weight {weight} --moe-cmr-budget 0.7 --moe-cmr-loss-weight 0.05, and the same model sizes"
    assert flags in capsys.readouterr().out
    criterion = translation_task.build_criterion(checkpoint_utils.load_checkpoint_to_cpu(str(path))["cfg"].criterion)
    assert criterion.balance_weight == pytest.approx(weight)
    assert (criterion.eps, criterion.cmr_budget, criterion.cmr_weight) == (0.1, 0.7, 0.05)


@pytest.mark.parametrize("entries", [
    {"last_optimizer_state": None},
    {"optimizer_history": None, "extra_state": None, "task_state": None, "last_optimizer_state": None},
    {"optimizer_history": []},
])  # fmt: skip
def test_a_released_set_without_the_state_of_training_is_converted(entries, translation_task, translation_batch, tmp_path):
    args, model = translation_model(translation_task, moe_freq=2)
    source = write_set(tmp_path, args, model)

    def change(state):
        for key, value in entries.items():
            state.pop(key) if value is None else state.update({key: value})

    for path in tmp_path.glob("m-*.pt"):
        rewrite(path, change)
    sample = translation_batch(5, 3, 7)
    assert_equal(outputs(load(convert(source), translation_task), sample), outputs(model, sample))


@pytest.mark.parametrize("tied", [{}, {"share_decoder_input_output_embed": True}], ids=["three tables", "two tables"])
@pytest.mark.parametrize("positions", [False, True], ids=["sinusoidal", "learned"])
def test_tables_that_are_not_shared_are_carried_over(tied, positions, translation_task, translation_batch, tmp_path):
    learned = {"encoder_learned_pos": positions, "decoder_learned_pos": positions}
    args, model = translation_model(translation_task, moe_freq=2, share_all_embeddings=False, **tied, **learned)
    path, sample = convert(write_set(tmp_path, args, model)), translation_batch(5, 3, 7)
    assert_equal(outputs(load(path, translation_task), sample), outputs(model, sample))


COMMANDS = {  # {}: the folder of the set
    "reshard": "reshard {}/m.pt {}/out.pt --portable",
    "average": "average {}/m.pt {}/out.pt",
    "upcycle": "upcycle {}/m-shared.pt {}/out.pt",
    "export": "export-hf {}/m-shared.pt {}/out.pt",
    "prune": "prune {}/m.pt {}/out.pt --load {}/load.jsonl --keep 0.5",
    "inspect": "inspect {}/m-rank-0.pt",
    "dictionary": "convert {}/m-shared.pt {}/out.pt --dict {}/dict.txt",
    "adapters": "convert --merge-lora {}/m.pt {}/out.pt",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands_refuse_the_set_with_the_command_that_converts_it(command, translation_task, tmp_path):
    source = write_set(tmp_path, *translation_model(translation_task, moe_freq=2))
    (tmp_path / "load.jsonl").write_text('{"num_updates": 1, "layers": ["encoder.layers.1"], "load": [[1, 2, 3, 4]]}\n')
    remedy = "is from fairseq's branch moe or nllb, of a set of files; convert them first: fairseq-sparsemixer convert "
    with pytest.raises(SystemExit, match=re.escape(f"{remedy}{source} OUT.pt")):
        main([word.format(tmp_path) for word in COMMANDS[command].split()])
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("name", ["m-rank-0.pt", "m-shared.pt"])
def test_fairseq_refuses_a_file_of_the_set_with_the_command_that_converts_it(name, translation_task, tmp_path):
    source = write_set(tmp_path, *translation_model(translation_task, moe_freq=2))
    with pytest.raises(SystemExit, match=re.escape(f"{name} is from fairseq's branch moe or nllb") + f".* convert {source}"):
        load(tmp_path / name, translation_task)


def test_a_single_file_of_the_set_names_the_set(translation_task, tmp_path):
    write_set(tmp_path, *translation_model(translation_task, moe_freq=2))
    with pytest.raises(SystemExit, match="which writes a set of files; name them as one file"):
        convert(tmp_path / "m-rank-0.pt")


def test_a_file_of_the_set_is_never_overwritten(translation_task, tmp_path):
    source = write_set(tmp_path, *translation_model(translation_task, moe_freq=2))
    with pytest.raises(SystemExit, match="would be overwritten, but it is an input"):
        main(["convert", str(source), str(tmp_path / "m-rank-1.pt")])


def theirs_in_transformers(module, args, model):
    """NllbMoe of transformers with the weights of a translation model of the branch."""
    sizes = {f"{stack}_{name}": STACK[ours] for stack in ("encoder", "decoder") for name, ours in
             {"layers": "layers", "ffn_dim": "ffn_embed_dim", "attention_heads": "attention_heads"}.items()}  # fmt: skip
    weights = model.state_dict()
    config = module.NllbMoeConfig(
        vocab_size=len(weights["encoder.embed_tokens.weight"]), d_model=M, num_experts=E, **sizes,
        encoder_sparse_step=args.encoder_moe_freq, decoder_sparse_step=args.decoder_moe_freq, second_expert_policy="all",
        moe_eval_capacity_token_fraction=1.0, moe_token_dropout=getattr(args, "moe_eom", 0.0), tie_word_embeddings=True,
    )  # fmt: skip
    names = {  # of the branch -> of transformers
        r"\.encoder_attn": ".cross_attention",
        r"\.final_layer_norm\.": ".ff_layer_norm.",
        r"\.moe_layer\.gate\.wg\.": ".ffn.router.classifier.",
        r"\.moe_layer\.experts\.": ".ffn.experts.expert_",
        r"(layers\.\d+)\.fc": r"\1.ffn.fc",
    }
    state = {
        "lm_head.weight": weights["decoder.output_projection.weight"],
        "model.shared.weight": weights["encoder.embed_tokens.weight"],
    }
    for name, tensor in weights.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        state[f"model.{name}"] = tensor
    other = module.NllbMoeForConditionalGeneration(config).eval()
    missing, _ = other.load_state_dict(state, strict=False)
    assert not missing
    return other


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"moe_eom": 0.2}], ids=["plain", "EOM"])
def test_a_converted_model_equals_nllb_moe_of_transformers(flags, translation_task, translation_batch, tmp_path):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("NllbMoe of transformers 5 sends all tokens to its first two experts; use transformers 4")
    args, model = translation_model(translation_task, encoder_moe_freq=2, decoder_moe_freq=4, moe_freq=0, **flags)
    sample = translation_batch(5, 3, 7)
    inputs = sample["net_input"]
    with torch.no_grad():
        expected = theirs_in_transformers(transformers, args, model)(
            input_ids=inputs["src_tokens"],
            attention_mask=inputs["src_tokens"].ne(1),
            decoder_input_ids=inputs["prev_output_tokens"],
            decoder_attention_mask=inputs["prev_output_tokens"].ne(1),
        ).logits[sample["target"] != 1]
    path = convert(write_set(tmp_path, args, model))
    assert_equal(outputs(load(path, translation_task), sample), expected)
