"""`inspect --trace`: counts by hand."""

import json

import pytest

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.trace_report import report_trace


@pytest.fixture
def trace(tmp_path):
    """Five tokens of three words in one layer, one of them without an expert, and one token in another."""
    tokens = [("the", [0], [0.5]), ("cat", [1, 0], [0.75, 0.25]), ("the", [0], [0.25]), ("the", [1], [0.5]), ("sat", [], [])]
    lines = [(0, "l0", word, experts, weights) for word, experts, weights in tokens] + [(0, "l1", "the", [7], [1.0])]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(
        json.dumps({"subset": "test", "layer": layer, "sentence": sentence, "position": place, "word": word,
                    "experts": experts, "weights": weights}) + "\n"
        for place, (sentence, layer, word, experts, weights) in enumerate(lines)
    ))  # fmt: skip
    return path


def test_words_are_counted_by_layer_and_expert(trace):
    first, second = report_trace(str(trace), num_words=2, min_count=1)
    assert (first.layer, first.tokens, first.words) == ("l0", 5, 3)
    zero, one = first.experts
    assert (zero.expert, zero.tokens, zero.share, zero.weight) == (0, 3, 3 / 5, (0.5 + 0.25 + 0.25) / 3)
    assert [(word.word, word.count, word.share) for word in zero.by_count] == [("the", 2, 2 / 3), ("cat", 1, 1)]
    assert [word.word for word in zero.by_share] == ["cat", "the"]
    assert [word.word for word in one.by_share] == ["cat", "the"]
    assert [(expert.expert, expert.tokens) for expert in second.experts] == [(7, 1)]


def test_rare_words_have_no_share(trace):
    (zero, _), _ = (layer.experts for layer in report_trace(str(trace), num_words=1, min_count=3))
    assert [word.word for word in zero.by_count] == [word.word for word in zero.by_share] == ["the"]


def test_the_command_prints_and_writes_the_words(trace, tmp_path, capsys):
    assert main(["inspect", "--trace", str(trace), "--min-count", "1", "--json", str(tmp_path / "words.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "l0: 5 tokens of 3 words" in printed and "the (2)" in printed and "cat (100%)" in printed
    layers = json.loads((tmp_path / "words.json").read_text())["layers"]
    assert layers[0]["experts"][1]["by_count"][0] == {"word": "cat", "count": 1, "share": 1}


@pytest.mark.parametrize("flags, message", [
    (["--trace", "none.jsonl"], "--trace none.jsonl does not exist; write it with --moe-trace none.jsonl"),
    (["--trace", ""], "--trace '' is empty"),
    (["model.pt", "--trace", "t"], "CHECKPOINT model.pt does not go with --trace t"),
    (["--trace", "t", "--words", "0"], "--words 0 must be at least 1"),
    ([], "inspect needs a file; give a checkpoint, or --trace FILE"),
])  # fmt: skip
def test_unusable_flags_are_refused(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        main(["inspect", *flags])


def test_an_empty_trace_is_refused(tmp_path):
    (tmp_path / "trace").write_text("")
    with pytest.raises(ConfigurationError, match="has no lines"):
        report_trace(str(tmp_path / "trace"))
