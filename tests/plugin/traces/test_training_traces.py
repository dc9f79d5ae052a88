"""--moe-trace and --moe-replay in fairseq-train."""

import gzip
import json
from collections import Counter

import pytest

from fairseq_sparsemixer.errors import ConfigurationError

pytestmark = pytest.mark.slow


def read(path):
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(logs):
    return [log["loss"] for log in logs["train_inner"]]


def test_a_training_traces_every_nth_update_and_validation_and_appends_when_resumed(train, tmp_path):
    """Each real token is there once for each layer; the words of the logs say how many there are."""
    flags = ("--moe-trace", tmp_path / "trace.jsonl.gz", "--moe-trace-interval", "2", "--max-update")
    logs = train(*flags, "3")
    train(*flags, "4")
    lines = read(tmp_path / "trace.jsonl.gz")
    count = Counter((line["subset"], line["updates"], line["layer"]) for line in lines)
    for layer in ("encoder.layers.0", "decoder.layers.0"):  # the target equals the source
        assert count["train", 0, layer] == logs["train_inner"][0]["wpb"]
        assert count["train", 2, layer] == logs["train_inner"][2]["wpb"]
        assert count["valid", 3, layer] == count["valid", 4, layer] > 0
    assert {(subset, updates) for subset, updates, _ in count} == {("train", 0), ("train", 2), ("valid", 3), ("valid", 4)}


@pytest.mark.parametrize("interval", ["100", "0"])
def test_a_new_training_replaces_the_trace(train, tmp_path, interval):
    """Also one that writes its first lines after updates, in validation."""
    for _ in range(2):
        train("--max-update", "1", "--no-save", "--moe-trace", tmp_path / "trace.jsonl", "--moe-trace-interval", interval)
        sentences = Counter(
            (line["subset"], line["layer"], line["sentence"], line["position"]) for line in read(tmp_path / "trace.jsonl")
        )
        assert set(sentences.values()) == {1}


@pytest.mark.parametrize("flags", [(), ("--checkpoint-activations",), ("--update-freq", "2", "--balance-scope", "update")])
def test_a_training_by_its_own_trace_equals_the_training(train, tmp_path, flags):
    """With weights of the model's own, the router learns as it did: the arg-max of a router without noise."""
    flags = ("--router", "switch", "--jitter-eps", "0", "--max-update", "3", "--no-save", "--max-epoch", "1", *flags)
    flags += ("--max-tokens", "60") if "--update-freq" in flags else ()
    expected = losses(train(*flags, "--moe-trace", tmp_path / "trace.jsonl", "--moe-trace-interval", "1"))
    replayed = losses(train(*flags, "--moe-replay", tmp_path / "trace.jsonl", "--moe-replay-weights", "model"))
    assert replayed == pytest.approx(expected, abs=1e-3) and len(expected) >= 2  # as logged


def test_validation_keeps_the_gates_choice_if_the_trace_has_only_training(train, tmp_path):
    flags = ("--max-update", "1", "--no-save")
    train(*flags, "--disable-validation", "--moe-trace", tmp_path / "trace.jsonl")
    assert {line["subset"] for line in read(tmp_path / "trace.jsonl")} == {"train"}
    logs = train(*flags, "--moe-replay", tmp_path / "trace.jsonl")
    assert logs["valid"]


def test_a_layer_that_layerdrop_skips_is_not_traced_and_such_a_trace_is_refused_before_training(train, tmp_path):
    """Layers of a trace: those that ran. A trace by a validation has all, and a training with LayerDrop follows it."""
    flags = ("--max-update", "6", "--no-save", "--max-epoch", "1", "--max-tokens", "40", "--disable-validation")
    flags += ("--encoder-layers", "2", "--moe-freq", "1", "--router", "switch", "--jitter-eps", "0")
    dropped = (*flags, "--encoder-layerdrop", "0.5")
    train(*dropped, "--moe-trace", tmp_path / "dropped.jsonl", "--moe-trace-interval", "1")
    ran = Counter((line["updates"], line["layer"]) for line in read(tmp_path / "dropped.jsonl"))
    updates = {update for update, _ in ran}
    for layer in ("decoder.layers.0", "encoder.layers.0", "encoder.layers.1"):
        done = [update for update in updates if (update, layer) in ran]
        assert len(done) == 6 if layer.startswith("decoder") else 0 < len(done) < 6
        assert all(ran[update, layer] == ran[update, "decoder.layers.0"] for update in done)  # the target equals the source
    with pytest.raises(ConfigurationError, match="not after the same update in .* and in .*, as a training with LayerDrop"):
        train(*dropped, "--moe-replay", tmp_path / "dropped.jsonl")
    train(*flags, "--moe-trace", tmp_path / "whole.jsonl", "--moe-trace-interval", "1")
    assert len(losses(train(*dropped, "--moe-replay", tmp_path / "whole.jsonl"))) == 6


def test_a_trace_without_the_training_data_is_refused_before_training(train, tmp_path):
    train("--max-update", "1", "--no-save", "--moe-trace", tmp_path / "trace.jsonl", "--moe-trace-interval", "0")
    with pytest.raises(ConfigurationError, match="--moe-replay .* has no subset train, only valid"):
        train("--max-update", "1", "--no-save", "--moe-replay", tmp_path / "trace.jsonl")
