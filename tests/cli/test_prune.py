"""`fairseq-sparsemixer prune`: the smaller model routes among the experts that stay, as the large one with the others masked."""

import json

import pytest
import torch
from sacrebleu.metrics import BLEU

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import moe_layers, named_moe_layers
from fairseq_sparsemixer.names import FIRST_WEIGHT
from fairseq_sparsemixer.plugin.checkpoints.layout import shard_path
from fairseq_sparsemixer.plugin.checkpoints.pruning import choose_experts, parse_keep
from fairseq_sparsemixer.plugin.checkpoints.resharding import reshard
from fairseq_sparsemixer.tools.pruning import as_one_file, expert_scores
from fairseq_sparsemixer.tools.sentences import load_model, make_sample

LAYERS = ["encoder.layers.0", "decoder.layers.0"]
LOAD = [[5, 1, 9, 2], [0, 7, 3, 6]]
BY_LANGUAGE = [[[5, 0, 0, 1], [0, 1, 9, 1]], [[0, 7, 0, 0], [0, 0, 3, 6]]]  # de, fr


@pytest.fixture
def load_file(tmp_path):
    line = {"num_updates": 1, "layers": LAYERS, "load": LOAD, "languages": ["de", "fr"], "language_load": BY_LANGUAGE}
    (tmp_path / "load.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path / "load.jsonl"


@pytest.fixture
def checkpoint(train, tmp_path):
    """checkpoint(router, flag, ...) -> the path of a model with two MoE layers of 4 experts, trained for one epoch."""

    def make(router, *flags):
        train("--router", router, "--max-epoch", 1, *flags)
        return str(tmp_path / "run" / "checkpoint_last.pt")

    return make


def prune(source, tmp_path, load_file, *flags):
    target = tmp_path / "out" / "pruned.pt"
    assert main(["prune", source, str(target), "--load", str(load_file), "--json", str(tmp_path / "f.json"), *flags]) == 0
    return str(target)


def logits(path, masked=None):
    """The output for a sentence; masked: the experts of each layer that the router must not choose."""
    model, _, task = load_model(path, None)
    for (name, layer), experts in zip(named_moe_layers(model), masked or ([], [])):
        index = torch.tensor(experts, dtype=torch.long)
        layer.gate.logits = lambda tokens, own=layer.gate.logits, index=index: own(tokens).index_fill(-1, index, -1e9)
    words = task.source_dictionary.symbols[4:10]
    with torch.no_grad():
        return model(**make_sample(task, " ".join(words), " ".join(words))["net_input"])[0], moe_layers(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "router, flags",
    [
        ("switch", []),
        ("topk", ["--moe-top-k", "2"]),
        ("topk", ["--moe-bias-update-rate", "0.01"]),
        ("topk", ["--moe-top-k", "2", "--moe-cmr", "--moe-eom", "0.2", "--moe-fom", "0.2"]),
        ("switch", ["--num-shared-experts", "2"]),
    ],
)
def test_the_pruned_model_is_the_large_one_with_the_others_masked(checkpoint, tmp_path, load_file, router, flags):
    source = checkpoint(router, *flags)
    target = prune(source, tmp_path, load_file, "--keep", "0.5")
    expected, _ = logits(source, masked=([1, 3], [0, 2]))
    found, layers = logits(target)
    assert [layer.gate.num_experts for layer in layers] == [2, 2]
    torch.testing.assert_close(found, expected)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["kept"] == {"encoder.layers.0": [0, 2], "decoder.layers.0": [1, 3]}
    assert torch.load(target, weights_only=False)["last_optimizer_state"] is None


@pytest.mark.slow
def test_a_pruned_model_of_uneven_layers_trains_on_with_the_printed_flags(checkpoint, train, tmp_path, load_file, capsys):
    source = checkpoint("switch")
    sharded = str(tmp_path / "sharded" / "checkpoint.pt")
    assert main(["reshard", source, sharded, "--expert-parallel-size", "2"]) == 0
    target = prune(sharded, tmp_path, load_file, "--keep", "0.5", "--uneven")
    (tmp_path / "other").mkdir()
    whole = prune(source, tmp_path / "other", load_file, "--keep", "0.5", "--uneven")
    one, other = (torch.load(path, weights_only=False) for path in (target, whole))
    assert all(torch.equal(one["model"][name], value) for name, value in other["model"].items())
    flags = json.loads((tmp_path / "f.json").read_text())["flags"].split()
    train("--router", "switch", *flags, "--max-epoch", 1, "--finetune-from-model", target, "--save-dir", tmp_path / "tuned")
    tuned = torch.load(tmp_path / "tuned" / "checkpoint_last.pt", weights_only=False)["model"]
    assert {name: value.shape for name, value in tuned.items()} == {name: one["model"][name].shape for name in tuned}


@pytest.mark.slow
def test_files_for_several_ranks_have_the_experts_of_one_file(checkpoint, tmp_path, load_file):
    source, joined = checkpoint("switch"), str(tmp_path / "joined.pt")
    sharded = str(tmp_path / "sharded" / "checkpoint.pt")
    assert main(["reshard", source, sharded, "--expert-parallel-size", "4"]) == 0
    (tmp_path / "one").mkdir()
    whole = prune(source, tmp_path / "one", load_file, "--keep", "0.5")
    target = prune(sharded, tmp_path, load_file, "--keep", "0.5", "--expert-parallel-size", "2")
    files = json.loads((tmp_path / "f.json").read_text())["target"]
    assert files == [shard_path(target, index) for index in range(2)]
    shards = [torch.load(file, weights_only=False)["model"] for file in files]
    assert [next(value.size(0) for name, value in shard.items() if name.endswith(FIRST_WEIGHT)) for shard in shards] == [1, 1]
    assert main(["reshard", target, joined, "--expert-parallel-size", "1"]) == 0
    found, expected = (torch.load(path, weights_only=False)["model"] for path in (joined, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_files_that_cannot_share_the_experts_are_refused(checkpoint, tmp_path, load_file):
    with pytest.raises(
        ConfigurationError, match="--expert-parallel-size 2 does not divide the 3 experts kept in encoder.layers.0"
    ):
        prune(checkpoint("switch"), tmp_path, load_file, "--keep", "3", "--expert-parallel-size", "2")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_the_bleu_before_and_after_of_a_sharded_checkpoint_is_sacrebleus_of_both_models(
    checkpoint, run_fairseq, translation_data, tmp_path, load_file, capsys
):
    subset = ["--gen-subset", "valid", "--beam", "1", "--required-batch-size-multiple", "1"]
    source = checkpoint("switch", "--max-epoch", 30)
    sharded = str(tmp_path / "two.pt")
    reshard(source, sharded, 2)
    target = prune(
        sharded, tmp_path, load_file, "--keep", "1", "--data", str(translation_data), "--generate-flags", " ".join(subset)
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pruned.pt"]
    found = json.loads((tmp_path / "f.json").read_text())["bleu"]
    assert f"BLEU {found['before']:.2f} -> {found['after']:.2f}" in capsys.readouterr().out
    for path, value in ((source, found["before"]), (target, found["after"])):
        run_fairseq("generate", translation_data, "--path", path, "--cpu", *subset)
        fields = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        sides = [{words[0][2:]: words[-1] for words in fields if words[0].startswith(mark)} for mark in ("D-", "T-")]
        numbers = sorted(sides[0])
        hypotheses, references = ([side[number] for number in numbers] for side in sides)
        assert len(numbers) == 8 and value == pytest.approx(BLEU().corpus_score(hypotheses, [references]).score)
    assert found["before"] != found["after"]


def test_one_file_is_tested_where_it_is(tmp_path):
    (tmp_path / "m.pt").write_bytes(b"")
    with as_one_file(str(tmp_path / "m.pt"), str(tmp_path / "out.pt")) as path:
        assert path == str(tmp_path / "m.pt")


def test_the_bleu_of_several_files_is_refused(tmp_path, load_file):
    with pytest.raises(ConfigurationError, match="--data tests OUT as one file; leave out --expert-parallel-size"):
        prune("m.pt", tmp_path, load_file, "--keep", "0.5", "--data", "bin", "--expert-parallel-size", "2")


def test_experts_are_chosen_by_score():
    scores = {"a": [0.4, 0.1, 0.3, 0.2], "b": [0.97, 0.01, 0.01, 0.01]}
    assert choose_experts(scores, 0.5, 1, uneven=False) == {"a": [0, 2], "b": [0, 1]}
    assert choose_experts(scores, 0.5, 1, uneven=True) == {"a": [0, 2, 3], "b": [0]}
    assert choose_experts(scores, parse_keep("3"), 1, uneven=False) == {"a": [0, 2, 3], "b": [0, 1, 2]}
    with pytest.raises(ConfigurationError, match="leaves 1 of the 4 experts of a, where a token uses 2; keep 2 to 4"):
        choose_experts(scores, 0.2, 2, uneven=False)


def test_languages_are_scored_by_their_largest_share(load_file):
    found = expert_scores(load_file, "language")
    assert found["encoder.layers.0"] == [5 / 6, 1 / 11, 9 / 11, 1 / 6]
    assert expert_scores(load_file, "language", ["de"])["decoder.layers.0"] == [0, 1, 0, 0]
    assert expert_scores(load_file, "load")["encoder.layers.0"] == [5 / 17, 1 / 17, 9 / 17, 2 / 17]
    with pytest.raises(ConfigurationError, match="--languages tr is not in .*; it has de, fr"):
        expert_scores(load_file, "language", ["tr"])


def test_sentences_without_a_language_are_of_no_language(load_file, tmp_path):
    line, notes = json.loads(load_file.read_text()), []
    line["languages"].append("")
    for layer, own in zip(line["language_load"], ([0, 0, 0, 3], [0, 0, 0, 10])):
        layer.append(own)
    (tmp_path / "untagged.jsonl").write_text(json.dumps(line) + "\n")
    assert expert_scores(tmp_path / "untagged.jsonl", "language", notes=notes) == expert_scores(load_file, "language")
    assert len(notes) == 1 and notes[0].startswith("28.3 % of the tokens in ")  # 13 of 46
    with pytest.raises(ConfigurationError, match="--languages no language is not in .*; it has de, fr"):
        expert_scores(tmp_path / "untagged.jsonl", "language", ["no language"])
    line.update(languages=[""], language_load=[[[1, 2, 3, 4]], [[1, 2, 3, 4]]])
    (tmp_path / "untagged.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigurationError, match="has no languages; train with --moe-load-languages, or use --by load"):
        expert_scores(tmp_path / "untagged.jsonl", "language")


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "1.5", "x", "nan", "inf", "0.0"])
def test_what_is_neither_a_share_nor_a_number_is_refused(text):
    with pytest.raises(ConfigurationError, match="must be a share such as 0.2, or a number"):
        parse_keep(text)


def test_an_open_quotation_is_refused_before_any_work(load_file, tmp_path):
    flags = ["--data", str(tmp_path), "--generate-flags", "--beam '4"]
    with pytest.raises(ConfigurationError, match="--generate-flags .* cannot be split into words .No closing quotation."):
        main(["prune", "in.pt", "out.pt", "--load", str(load_file), "--keep", "0.5", *flags])


@pytest.mark.parametrize("flags, sentence", [
    (["--load", "no"], "--load no is not a file; give the --moe-load-file of in.pt's training"),
    (["--data", "no"], "--data no is not a folder; give the binarised data"),
])  # fmt: skip
def test_missing_files_are_refused_before_any_work(load_file, flags, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        main(["prune", "in.pt", "out.pt", "--load", str(load_file), "--keep", "0.5", *flags])


@pytest.mark.slow
@pytest.mark.parametrize("router, sentence", [
    ("hash", "has --router hash, which routes by the token's number"),
    ("dense", "has no experts to prune"),
    ("gshard", "leaves 1 of the 4 experts of encoder.layers.0, where a token uses 2; keep 2 to 4"),
])  # fmt: skip
def test_what_cannot_be_pruned_is_refused(checkpoint, tmp_path, load_file, router, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        prune(checkpoint(router), tmp_path, load_file, "--keep", "0.2")


@pytest.mark.slow
def test_the_load_of_another_model_is_refused(checkpoint, tmp_path, load_file):
    load_file.write_text(load_file.read_text().replace("decoder.layers.0", "decoder.layers.9"))
    with pytest.raises(ConfigurationError, match="has 4 experts in decoder.layers.0, and the load none"):
        prune(checkpoint("switch"), tmp_path, load_file, "--keep", "0.5")
