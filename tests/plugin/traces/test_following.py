"""Following the layers of a model without fairseq's commands: what is recorded, replayed and refused."""

import json
from argparse import Namespace

import pytest
import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.traces.files import TraceWriter
from fairseq_sparsemixer.plugin.traces.following import Following
from fairseq_sparsemixer.plugin.traces.options import open_following, wanted
from fairseq_sparsemixer.plugin.traces.replay import Replay

ROUTERS = ["default_moe", "dense_st", "expert_choice", "expert_threshold", "gshard", "hash", "remoe", "sparsemixer"]
ROUTERS += ["sparsemixer_v2", "topk"]


def forward(model, sample, following):
    """The model's output [B, T, V] on the sample, followed."""
    following.subset, following.training = "valid", model.training
    following.attach(model)
    following.open_batch(sample)
    with following.recorded():
        output, _ = model(**sample["net_input"])
    following.close_batch()
    following.detach()
    return output


@pytest.fixture
def trace_of(tmp_path):
    """trace_of(model, sample) -> (its output, the file of its trace)."""

    def trace(model, sample):
        path = tmp_path / "trace.jsonl"
        return forward(model, sample, Following(TraceWriter(str(path)), None)), path

    return trace


@pytest.mark.parametrize("router", ROUTERS)
def test_a_replay_gives_the_same_output(build_translation_model, translation_batch, trace_of, router):
    """Also of routers whose tokens have different numbers of experts, and of those that mix in default outputs."""
    flags = {"moe_encoder_only": True} if router == "expert_choice" else {}
    model, sample = build_translation_model(router=router, moe_freq=1, **flags).eval(), translation_batch(5, 2, 7)
    output, path = trace_of(model, sample)
    replayed = forward(model, sample, Following(None, Replay(str(path))))
    torch.testing.assert_close(replayed, output, rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_sampled_routing_is_replayed_without_the_router(build_translation_model, translation_batch, trace_of, router):
    """In training, noise would choose other experts; and a replay's weights do not depend on the router's projection."""
    flags = {"moe_encoder_only": True} if router == "expert_choice" else {}
    model, sample = build_translation_model(router=router, moe_freq=1, **flags).train(), translation_batch(5, 2, 7)
    output, path = trace_of(model, sample)
    if router != "default_moe":  # whose default outputs have the router's weights
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate.projection" in name:
                    parameter.copy_(torch.randn_like(parameter))
    replayed = forward(model, sample, Following(None, Replay(str(path))))
    torch.testing.assert_close(replayed, output, rtol=0, atol=1e-6)


def test_the_models_own_weights_carry_the_routers_gradient(build_translation_model, translation_batch, trace_of):
    model, sample = build_translation_model(router="switch").train(), translation_batch(5, 2)
    _, path = trace_of(model, sample)
    for own in (False, True):
        model.zero_grad()
        forward(model, sample, Following(None, Replay(str(path)), own_weights=own)).sum().backward()
        gradients = [gate for name, gate in model.named_parameters() if "gate.projection" in name]
        assert all((gate.grad is not None and bool(gate.grad.ne(0).any())) == own for gate in gradients)


def test_a_replay_does_not_depend_on_the_batch(build_translation_model, translation_batch, trace_of):
    """A sentence alone, without padding, follows the same routes as in its batch."""
    model, sample = build_translation_model(router="topk").eval(), translation_batch(5, 2, 7)
    output, path = trace_of(model, sample)
    length, row = 2, sample["id"].tolist().index(1)
    source = sample["net_input"]["src_tokens"][row]
    alone = {
        "id": torch.tensor([1]),
        "net_input": {
            "src_tokens": source[source.ne(model.encoder.dictionary.pad())].view(1, -1),
            "src_lengths": torch.tensor([length + 1]),
            "prev_output_tokens": sample["net_input"]["prev_output_tokens"][row : row + 1, : length + 1],
        },
    }
    replayed = forward(model, alone, Following(None, Replay(str(path))))
    torch.testing.assert_close(replayed, output[row : row + 1, : length + 1], rtol=0, atol=1e-5)


def edited(path, **values):
    lines = [{**json.loads(line), **values} for line in path.read_text().splitlines()]
    return "".join(json.dumps(line) + "\n" for line in lines)


def without(path, **values):
    (name, value), *_ = values.items()
    return "".join(line + "\n" for line in path.read_text().splitlines() if json.loads(line)[name] != value)


@pytest.mark.parametrize("change, message", [
    (
        lambda path: without(path, sentence=1),
        "has no sentence 1 of valid in encoder.layers.0; trace the same data, with --required-batch-size-multiple 1",
    ),
    (lambda path: without(path, layer="encoder.layers.0"), "has no layer encoder.layers.0, only decoder.layers.0; trace a model"),
    (lambda path: edited(path, experts=[4], weights=[1]), "names expert 4 in encoder.layers.0, which has 4 experts"),
    (lambda path: edited(path, subset="test"), "has no subset valid, only test"),
    (lambda path: edited(path, word="w0"), "has 'w0' at position .* of encoder.layers.0 there, and .* here; trace the same data"),
    (lambda path: path.read_text()[:-30], "line .* is not a line of --moe-trace; remove it, or trace again"),
    (lambda path: without(path, position=1), "lacks position 1 of sentence .* of valid in .*; trace again"),
])  # fmt: skip
def test_a_trace_that_does_not_fit_is_refused(build_translation_model, translation_batch, trace_of, change, message):
    model, sample = build_translation_model(router="topk").eval(), translation_batch(5, 2)
    _, path = trace_of(model, sample)
    path.write_text(change(path))
    with pytest.raises(ConfigurationError, match=f"--moe-replay .*{message}"):
        forward(model, sample, Following(None, Replay(str(path))))


def test_a_sentence_of_another_length_is_refused(build_translation_model, translation_batch, trace_of):
    model = build_translation_model(router="topk").eval()
    _, path = trace_of(model, translation_batch(5, 2))
    with pytest.raises(ConfigurationError, match="sentence 1 of valid has 3 tokens in encoder.layers.0 there, and 5 here"):
        forward(model, translation_batch(5, 4), Following(None, Replay(str(path))))


@pytest.mark.parametrize("trace, replay", [("t.jsonl", "t.jsonl"), ("./t.jsonl", "t.jsonl"), ("t.jsonl", "t-rank-1.jsonl")])
def test_several_ranks_cannot_trace_into_the_file_they_replay(
    build_translation_model, translation_batch, trace_of, tmp_path, monkeypatch, trace, replay
):
    _, path = trace_of(build_translation_model(router="topk").eval(), translation_batch(5, 2))
    monkeypatch.chdir(tmp_path)
    content = path.read_text()
    for name in ("t.jsonl", "t-rank-0.jsonl", "t-rank-1.jsonl"):
        (tmp_path / name).write_text(content)
    flags = wanted(Namespace(moe_trace=trace, moe_replay=replay))
    with pytest.raises(ConfigurationError, match="--moe-trace .* would replace files of --moe-replay .*; give it another file"):
        open_following(flags, (1, 2))
    assert (tmp_path / "t-rank-1.jsonl").read_text() == content
    assert open_following(flags._replace(trace="other.jsonl"), (1, 2)).replay is not None


def test_one_process_may_replace_the_trace_it_replays(build_translation_model, translation_batch, trace_of):
    model, sample = build_translation_model(router="topk").eval(), translation_batch(5, 2)
    _, path = trace_of(model, sample)
    following = open_following(wanted(Namespace(moe_trace=str(path), moe_replay=str(path))))
    assert following.replay is not None and following.replay.covers("valid")


def test_a_model_without_experts_is_refused(build_translation_model, translation_batch, tmp_path):
    model = build_translation_model(router="dense")
    with pytest.raises(ConfigurationError, match="--moe-trace is for models with experts, and this one has none"):
        forward(model, translation_batch(2), Following(TraceWriter(str(tmp_path / "trace")), None))


@pytest.mark.parametrize("flags, message", [
    ({"moe_replay": "nowhere.jsonl"}, "--moe-replay nowhere.jsonl does not exist; write it with --moe-trace nowhere.jsonl"),
    ({"moe_trace": "/dev/null/trace"}, "--moe-trace /dev/null/trace cannot be written .*; give another path"),
    ({"moe_trace": ""}, "--moe-trace '' is empty; give a file, or leave it out"),
    ({"moe_trace_interval": 5}, "--moe-trace-interval 5 needs a file to write to; give --moe-trace, too"),
    ({"moe_replay": "t", "moe_trace_interval": 5}, "--moe-trace-interval 5 needs a file to write to"),
    ({"moe_trace": "t", "moe_trace_interval": -1}, "--moe-trace-interval -1 must be at least 0"),
    ({"moe_replay": "t", "moe_replay_weights": "mine"}, "--moe-replay-weights mine must be trace or model"),
    ({"moe_trace": "t", "moe_replay_weights": "model"}, "--moe-replay-weights model needs a trace; give --moe-replay, too"),
])  # fmt: skip
def test_unusable_flags_are_refused(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        open_following(wanted(Namespace(**flags)))
