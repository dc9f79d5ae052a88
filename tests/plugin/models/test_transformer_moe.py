"""The whole translation model: padding, activation checkpointing, decoding, precision, copies."""

import copy
import io

import fairseq.utils
import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates.sparsemixer import draw_sampling_noise
from fairseq_sparsemixer.moe.layer import MoELayer
from fairseq_sparsemixer.plugin.models import transformer_moe

ROUTERS = ["sparsemixer", "switch"]


def moe_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def run(model, sample):
    """The negative log-likelihood of the target, summed over non-padding tokens."""
    logits, _ = model(**sample["net_input"])
    losses = -logits.log_softmax(-1).gather(-1, sample["target"].unsqueeze(-1)).squeeze(-1)
    return losses[sample["target"] != model.decoder.padding_idx].sum()


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_every_second_layer_has_experts_starting_with_the_first(build_translation_model, translation_batch):
    model = build_translation_model(encoder_layers=3, decoder_layers=2)
    assert list(moe_layers(model)) == ["encoder.layers.0.fc1.moe", "encoder.layers.2.fc1.moe", "decoder.layers.0.fc1.moe"]
    logits, _ = model(**translation_batch(3, 5)["net_input"])
    assert logits.shape == (2, 6, 24)


def test_moe_freq_chooses_the_layers_and_dense_has_none(build_translation_model):
    assert len(moe_layers(build_translation_model(encoder_layers=4, decoder_layers=3, moe_freq=3))) == 3
    assert len(moe_layers(build_translation_model(moe_freq=1))) == 4
    assert not moe_layers(build_translation_model(router="dense"))


@pytest.mark.parametrize("flags", [
    dict(moe_freq=0), dict(num_experts=0), dict(router="none"), dict(moe_top_k=5), dict(jitter_eps=-1.0),
])  # fmt: skip
def test_invalid_options_are_refused_before_building_a_model(build_translation_model, flags):
    with pytest.raises(ConfigurationError, match="--" + next(iter(flags)).replace("_", "-")):
        build_translation_model(**flags)


class SharedNoise:
    """The same noise for the same token of the same sentence, in any batch: call `put` before each forward.

    places: {"encoder", "decoder"} -> (sentence, position) of each row that the gates see, None for padding.
    """

    def __init__(self, model, longest, sentences, num_experts):
        self.places = {}
        for name, layer in moe_layers(model).items():
            table = draw_sampling_noise(torch.zeros(sentences * longest, num_experts, dtype=torch.float64))
            if layer.gate.router == "switch":
                table = 1 + 0.1 * (2 * torch.rand(sentences * longest, num_experts, dtype=torch.float64) - 1)
            layer.gate.draw_noise = lambda logits, table=table, stack=name.split(".")[0]: self.take(table, stack, longest)

    def take(self, table, stack, longest):
        rows = torch.tensor([0 if place is None else place[0] * longest + place[1] for place in self.places[stack]])
        return type(table)(*(noise[rows] for noise in table)) if isinstance(table, tuple) else table[rows]

    def put(self, sample, pad, sentences):
        """Set `places` for a sample with these sentences as rows; layers see time first."""
        net_input = sample["net_input"]
        for stack, tokens in (("encoder", net_input["src_tokens"]), ("decoder", net_input["prev_output_tokens"])):
            position = (tokens != pad).cumsum(1) - 1
            self.places[stack] = [
                (sentence, position[row, t].item()) if tokens[row, t] != pad else None
                for t in range(tokens.size(1))
                for row, sentence in enumerate(sentences)
            ]


@pytest.fixture
def attention_in_full_precision(monkeypatch):
    """Keep attention in float64. fairseq computes it in float32, with rounding that depends on the CPU and on padding."""
    monkeypatch.setattr(fairseq.utils, "softmax", lambda x, dim, onnx_trace=False: x.softmax(dim))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("normalize_before", [False, True])
def test_a_padded_batch_equals_its_sentences_alone(
    build_translation_model, dictionary, attention_in_full_precision, router, normalize_before
):
    from fairseq.data.language_pair_dataset import collate

    model = build_translation_model(
        router=router, encoder_normalize_before=normalize_before, decoder_normalize_before=normalize_before
    ).double()
    sentences = [
        {
            "id": i,
            "source": torch.cat([torch.randint(4, 24, (n,)), torch.tensor([dictionary.eos()])]),
            "target": torch.cat([torch.randint(4, 24, (9 - n,)), torch.tensor([dictionary.eos()])]),
        }
        for i, n in enumerate((2, 7, 4))
    ]
    noise = SharedNoise(model, longest=9, sentences=3, num_experts=4)

    def results(samples):
        """Loss, gradients and statistics, summed over batches."""
        model.zero_grad()
        total, statistics = 0.0, {}
        for batch in samples:
            sample = collate(batch, dictionary.pad(), dictionary.eos(), input_feeding=True)
            noise.put(sample, dictionary.pad(), sample["id"].tolist())
            loss = run(model, sample)
            loss.backward()
            total += loss.item()
            for name, layer in moe_layers(model).items():
                for figure, value in layer.routing.statistics().items():
                    statistics[name, figure] = statistics.get((name, figure), 0) + value
        return total, gradients(model), statistics

    padded, alone = results([sentences]), results([[sentence] for sentence in sentences])
    assert padded[0] == pytest.approx(alone[0], rel=1e-10)
    assert_same_gradients(padded[1], alone[1], rtol=1e-8, atol=1e-10)
    for name, value in padded[2].items():
        torch.testing.assert_close(value, alone[2][name])


def test_more_padding_does_not_change_auxiliary_losses(build_translation_model, translation_batch, dictionary):
    model = build_translation_model(router="switch", jitter_eps=0.0)
    sample = translation_batch(3, 6)
    run(model, sample)
    before = {name: layer.routing.aux_losses for name, layer in moe_layers(model).items()}
    net_input = sample["net_input"]
    pad = torch.full((2, 5), dictionary.pad())
    net_input["src_tokens"] = torch.cat([pad, net_input["src_tokens"]], 1)
    net_input["prev_output_tokens"] = torch.cat([net_input["prev_output_tokens"], pad], 1)
    sample["target"] = torch.cat([sample["target"], pad], 1)
    run(model, sample)
    for name, layer in moe_layers(model).items():
        for loss, value in layer.routing.aux_losses.items():
            torch.testing.assert_close(value, before[name][loss], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("offload", [False, True])
def test_activation_checkpointing_recomputes_the_same_routing_and_gradients(
    build_translation_model, translation_batch, router, offload
):
    """With dropout and sampling. Every second layer is dense and uses fairseq's own wrapper."""
    plain = build_translation_model(router=router, dropout=0.2)
    checkpointed = build_translation_model(router=router, dropout=0.2, checkpoint_activations=True, offload_activations=offload)
    checkpointed.load_state_dict(plain.state_dict())
    sample = translation_batch(3, 6, 5)
    routed = []
    for layer in moe_layers(checkpointed).values():
        layer.gate.register_forward_hook(lambda gate, inputs, routing: routed.append((id(gate), routing.expert_index)))
    found = []
    for model in (plain, checkpointed):
        torch.manual_seed(7)
        loss = run(model, sample)
        loss = loss + sum(sum(layer.routing.aux_losses.values()) for layer in moe_layers(model).values())
        loss.backward()
        found.append((loss.item(), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_same_gradients(found[0][1], found[1][1], rtol=1e-6, atol=1e-6)
    for gate in {gate for gate, _ in routed}:
        first, again = [index for key, index in routed if key == gate]
        assert torch.equal(first, again)


def test_the_auxiliary_loss_reaches_the_router_through_activation_checkpointing(build_translation_model, translation_batch):
    model = build_translation_model(router="switch", checkpoint_activations=True)
    model(**translation_batch(3, 6)["net_input"])
    sum(layer.routing.aux_losses["balance"] for layer in moe_layers(model).values()).backward()
    for layer in moe_layers(model).values():
        assert layer.gate.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("router", ROUTERS)
def test_incremental_beam_search_equals_forced_decoding(build_translation_model, translation_batch, dictionary, router):
    model = build_translation_model(router=router).eval()
    sample = translation_batch(3, 7, 5)
    generator = SequenceGenerator([model], dictionary, beam_size=3, max_len_b=8)
    hypotheses = generator.generate([model], sample)
    for row, beam in enumerate(hypotheses):
        source = sample["net_input"]["src_tokens"][row].unsqueeze(0)
        source = source[source != dictionary.pad()].unsqueeze(0)
        for hypothesis in beam:
            tokens = hypothesis["tokens"].unsqueeze(0)
            previous = torch.cat([tokens.new_tensor([[dictionary.eos()]]), tokens[:, :-1]], 1)
            logits, _ = model(source, torch.tensor([source.size(1)]), previous)
            forced = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).flatten()
            # the generator only forbids padding, which does not change other scores; the last word is forced to be </s>
            torch.testing.assert_close(hypothesis["positional_scores"], forced, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_sentence_is_translated_the_same_in_any_batch(build_translation_model, translation_batch, dictionary, router):
    model = build_translation_model(router=router).eval()
    generator = SequenceGenerator([model], dictionary, beam_size=2, max_len_b=8)
    sample = translation_batch(3, 7, 5)
    together = generator.generate([model], sample)
    for row, length in enumerate(sample["net_input"]["src_lengths"].tolist()):
        source = sample["net_input"]["src_tokens"][row, -length:].unsqueeze(0)
        (alone,) = generator.generate([model], {"net_input": {"src_tokens": source, "src_lengths": torch.tensor([length])}})
        assert alone[0]["tokens"].tolist() == together[row][0]["tokens"].tolist()
        torch.testing.assert_close(alone[0]["score"], together[row][0]["score"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("flags", [
    dict(encoder_normalize_before=True, decoder_normalize_before=True),
    dict(share_all_embeddings=True),
    dict(share_decoder_input_output_embed=True, layernorm_embedding=True),
    dict(activation_fn="gelu", activation_dropout=0.1, moe_freq=1),
    dict(encoder_layerdrop=0.5, decoder_layerdrop=0.5),
], ids=lambda flags: next(iter(flags)))  # fmt: skip
def test_fairseqs_model_variants_train(build_translation_model, translation_batch, router, flags):
    model = build_translation_model(router=router, **flags)
    for _ in range(10 if "encoder_layerdrop" in flags else 1):
        run(model, translation_batch(3, 6)).backward()
    for name, layer in moe_layers(model).items():
        assert layer.gate.projection.weight.grad.isfinite().all(), name
    if "share_all_embeddings" in flags:
        assert model.encoder.embed_tokens is model.decoder.embed_tokens
        assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight


@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_trains_and_routes_in_float32(build_translation_model, translation_batch, router):
    model = build_translation_model(router=router).bfloat16()
    run(model, translation_batch(3, 6)).backward()
    for layer in moe_layers(model).values():
        assert layer.routing.combine_weight.dtype == layer.routing.probabilities.dtype == torch.float32
        assert layer.gate.projection.weight.grad.dtype == torch.bfloat16
        assert layer.experts.weight_in.grad.abs().sum() > 0


def test_experts_use_fairseqs_activation_and_activation_dropout(build_translation_model):
    model = build_translation_model(activation_fn="gelu", activation_dropout=0.3)
    for layer in moe_layers(model).values():
        assert layer.experts.activation(torch.tensor([-1.0])).item() == pytest.approx(-0.1587, abs=1e-4)
        assert layer.experts.dropout == 0.3


def test_a_model_can_be_copied_and_saved_after_a_forward(build_translation_model, translation_batch):
    model = build_translation_model()
    sample = translation_batch(3, 6)
    run(model, sample)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = run(model.eval(), sample)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(run(twin.eval(), sample), expected)


def test_the_same_seed_gives_the_same_model_and_the_same_loss(build_translation_model, translation_batch):
    sample = translation_batch(3, 6)
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(run(build_translation_model(dropout=0.2), sample).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("checkpointing, least", [(True, 0), (False, 1234)])
def test_every_layer_is_wrapped_for_fsdp(checkpointing, least, build_translation_model, monkeypatch):
    wrapped = []

    def record(module, min_num_params):
        wrapped.append((type(module).__name__, min_num_params))
        return module

    monkeypatch.setattr(transformer_moe, "fsdp_wrap", record)
    build_translation_model(router="switch", moe_freq=2, checkpoint_activations=checkpointing, min_params_to_wrap=1234)
    with_experts = [(name, count) for name, count in wrapped if name.startswith("MoE")]
    assert with_experts == [("MoEEncoderLayer", least), ("MoEDecoderLayer", least)]
