"""--moe-trace and --moe-replay in fairseq's commands, against forwards over one sentence at a time."""

import io
import json
import pickle
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from runs import arguments, run, train

import fairseq_sparsemixer
from fairseq_sparsemixer.moe.layer import named_moe_layers

pytestmark = pytest.mark.slow
USER_DIR = Path(fairseq_sparsemixer.__file__).parent
TOPK = ["--router", "topk", "--moe-top-k", "2", "--num-experts", "4", "--moe-freq", "1"]


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):
    """Two checkpoints of the same shape, trained for a few updates from different seeds."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("a", 1), ("b", 2)):
        train(corpus, folder / name, *TOPK, "--seed", seed, "--no-epoch-checkpoints", updates=3, moe=False)
    return {name: folder / name / "checkpoint_last.pt" for name in ("a", "b")}


@pytest.fixture
def command(corpus, models, run_fairseq):
    """command(name, model, flag, ...) runs one of fairseq's commands on `valid`, in batches of three with padding."""

    def call(name: str, model: str, *flags):
        if name == "validate":
            return validate(run_fairseq, corpus, models[model], *flags)
        return run_fairseq(name, *common(corpus, models[model]), "--gen-subset", "valid", *flags)

    return call


@pytest.fixture(scope="module")
def traces(models, corpus, run_fairseq, tmp_path_factory):
    """The trace of each model on `valid`."""
    folder = tmp_path_factory.mktemp("traces")
    for name in models:
        validate(run_fairseq, corpus, models[name], "--moe-trace", folder / f"{name}.jsonl")
    return {name: folder / f"{name}.jsonl" for name in models}


def validate(run_fairseq, corpus, model, *flags):
    return run_fairseq("validate", *common(corpus, model), "--valid-subset", "valid", *flags)


def common(corpus, model):
    """Flags of a command, for batches of three sentences with padding."""
    return (
        corpus, "--user-dir", USER_DIR, "--path", model, "--task", "translation", "--batch-size", 3,
        "--required-batch-size-multiple", 1, "--cpu",
    )  # fmt: skip


def read(path):
    """{(layer, sentence): [(word, experts, weights), ...]} of a trace, whose positions are consecutive."""
    found = defaultdict(list)
    for line in map(json.loads, Path(path).read_text().splitlines()):
        assert line["position"] == len(found[line["layer"], line["sentence"]])
        found[line["layer"], line["sentence"]].append((line["word"], line["experts"], line["weights"]))
    return dict(found)


def by_hand(checkpoint, corpus, hypotheses=None):
    """The same from a forward over each sentence of `valid` alone; hypotheses {number: words} take the place of targets."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], {"data": str(corpus)})
    model.eval()
    task.load_dataset("valid")
    found = {}
    for number, pair in enumerate(task.dataset("valid")):
        source, target = pair["source"], pair["target"]
        if hypotheses is not None:
            target = task.target_dictionary.encode_line(hypotheses[number], add_if_not_exist=False).long()
        previous = torch.cat([target[-1:], target[:-1]])
        with torch.no_grad():
            model(source[None], torch.tensor([len(source)]), previous[None])
        for name, layer in named_moe_layers(model):
            tokens = source if name.startswith("encoder") else previous
            routing = layer.routing
            rows = zip(tokens.tolist(), routing.expert_index.tolist(), routing.combine_weight.tolist())
            found[name, number] = [(task.source_dictionary[token], *row) for token, *row in rows]
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for place, tokens in expected.items():
        assert [token[:2] for token in found[place]] == [token[:2] for token in tokens], place
        weights = [torch.tensor([token[2] for token in side]) for side in (found[place], tokens)]
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def generated(folder):
    """{number: (score, words)} of a file of fairseq-generate."""
    lines = [line.split("\t") for line in (folder / "generate-valid.txt").read_text().splitlines() if line.startswith("H-")]
    return {int(number[2:]): (float(score), words) for number, score, words in lines}


SEARCH = ("--beam", 3, "--max-len-b", 8)


def test_validation_is_traced_as_a_forward_over_each_sentence_alone(traces, corpus, models):
    assert_same(read(traces["a"]), by_hand(models["a"], corpus))


def test_generation_is_traced_as_a_forward_that_is_forced_to_the_best_hypothesis(command, corpus, models, tmp_path):
    command("generate", "a", *SEARCH, "--moe-trace", tmp_path / "trace.jsonl", "--results-path", tmp_path)
    hypotheses = {number: words for number, (_, words) in generated(tmp_path).items()}
    assert_same(read(tmp_path / "trace.jsonl"), by_hand(models["a"], corpus, hypotheses))


def test_scores_of_references_are_traced_as_validation(command, corpus, models, tmp_path):
    command("generate", "a", "--score-reference", "--moe-trace", tmp_path / "trace.jsonl", "--results-path", tmp_path)
    assert_same(read(tmp_path / "trace.jsonl"), by_hand(models["a"], corpus))


def test_shards_of_a_generation_write_a_file_each_which_hold_all(command, tmp_path):
    flags = ("--beam", "2", "--moe-trace")
    command("generate", "a", *flags, tmp_path / "whole.jsonl")
    for rank in (1, 0):
        command("generate", "a", "--distributed-world-size", "2", "--distributed-rank", rank, *flags, tmp_path / "parts.jsonl")
    parts = [json.loads(line) for rank in (0, 1) for line in (tmp_path / f"parts-rank-{rank}.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]

    def places(lines):
        return sorted((line["layer"], line["sentence"], line["position"], line["word"]) for line in lines)

    assert places(parts) == places(whole) and not (tmp_path / "parts.jsonl").exists()


@pytest.mark.parametrize("weights", ["trace", "model"])
def test_a_model_that_replays_its_own_trace_generates_the_same(command, tmp_path, weights):
    command("generate", "a", *SEARCH, "--moe-trace", tmp_path / "trace.jsonl", "--results-path", tmp_path / "plain")
    replay = ("--moe-replay", tmp_path / "trace.jsonl", "--moe-replay-weights", weights, "--moe-trace", tmp_path / "again.jsonl")
    command("generate", "a", *SEARCH, *replay, "--results-path", tmp_path / "replay", "--batch-size", 5)
    plain, again = generated(tmp_path / "plain"), generated(tmp_path / "replay")
    for number, (score, words) in plain.items():
        assert again[number] == (pytest.approx(score, abs=1e-6), words)
    assert_same(read(tmp_path / "again.jsonl"), read(tmp_path / "trace.jsonl"))


@pytest.mark.parametrize("weights", ["trace", "model"])
def test_a_model_follows_the_trace_of_another_one(command, traces, corpus, models, tmp_path, weights):
    """Its routes are those of the trace; with its own weights, these are its own for the experts of the trace."""
    replay = ("--moe-replay", traces["a"], "--moe-replay-weights", weights)
    command("validate", "b", *replay, "--moe-trace", tmp_path / "b.jsonl")
    a, followed, own = read(traces["a"]), read(tmp_path / "b.jsonl"), by_hand(models["b"], corpus)
    experts = [{place: [token[1] for token in tokens] for place, tokens in trace.items()} for trace in (a, followed, own)]
    assert experts[0] == experts[1] != experts[2]
    assert (a == followed) == (weights == "trace")
    assert all(sum(token[2]) == pytest.approx(1) for tokens in followed.values() for token in tokens)


def test_the_input_of_interactive_is_traced_under_the_numbers_of_its_output(corpus, models, tmp_path, monkeypatch, capsys):
    import fairseq_cli.interactive

    (tmp_path / "input").write_text("w1 w2 w3\nw4\nw5 w6\n")
    run(
        fairseq_cli.interactive.cli_main, corpus, "--user-dir", USER_DIR, "--path", models["a"], "--cpu", *SEARCH,
        "--input", tmp_path / "input", "--buffer-size", 2, "--max-tokens", 50, "--moe-trace", tmp_path / "trace.jsonl",
    )  # fmt: skip
    trace = read(tmp_path / "trace.jsonl")
    words = {number: " ".join(token[0] for token in trace["encoder.layers.0", number]) for number in range(3)}
    assert words == {0: "w1 w2 w3 </s>", 1: "w4 </s>", 2: "w5 w6 </s>"}


def test_every_command_takes_the_flags_and_names_them_in_its_help():
    from fairseq import options

    with arguments("--user-dir", USER_DIR):
        parsers = [
            options.get_training_parser(), options.get_validation_parser(), options.get_generation_parser(),
            options.get_interactive_generation_parser(), options.get_eval_lm_parser(),
        ]  # fmt: skip
    for parser in parsers:
        help_text = io.StringIO()
        parser.print_help(help_text)
        assert all(flag in help_text.getvalue() for flag in ("--moe-trace", "--moe-trace-interval", "--moe-replay"))


def test_a_spawned_rank_gets_our_main(tmp_path):
    """fairseq pickles a command's main for the ranks that it spawns; they read the user-dir too late to replace it."""
    import fairseq_cli.validate

    (tmp_path / "main").write_bytes(pickle.dumps(fairseq_cli.validate.main))
    program = (
        "import pickle, sys; from fairseq.distributed import utils; main = pickle.load(open(sys.argv[1], 'rb'));"
        "import fairseq_cli.validate as module; assert module.main is main; print(main.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "main"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "fairseq_sparsemixer.plugin.traces.commands"
