"""Every router in the translation model: training, loading, generation."""

import pytest
import torch
from fairseq.dataclass.configs import GenerationConfig
from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterion, MoECrossEntropyCriterionConfig

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import GATES
from fairseq_sparsemixer.moe.gates.hash import hash_ids
from fairseq_sparsemixer.moe.layer import MoELayer
from fairseq_sparsemixer.plugin.models.parameters import parameter_counts


def flags_of(router):
    return {"router": router, **({} if GATES[router].causal else {"moe_encoder_only": True})}


def moe_layers(model):
    return [module for module in model.modules() if isinstance(module, MoELayer)]


@pytest.mark.parametrize("router", sorted(GATES))
def test_a_model_with_the_router_trains_loads_and_generates(router, build_translation_model, translation_task, translation_batch):
    model = build_translation_model(**flags_of(router))
    cfg = MoECrossEntropyCriterionConfig(sentence_avg=False, moe_z_loss_weight=0.001)
    criterion = MoECrossEntropyCriterion.build_criterion(cfg, translation_task)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    sample = translation_batch(3, 6, 5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss, _, _ = criterion(model, sample)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    restored = build_translation_model(**flags_of(router))
    restored.load_state_dict(model.state_dict())
    generator = translation_task.build_generator([restored], GenerationConfig(beam=2, max_len_b=8))
    with torch.no_grad():
        hypotheses = translation_task.inference_step(generator, [restored], sample)
    assert len(hypotheses) == 3 and all(h[0]["tokens"].numel() for h in hypotheses)


def test_hash_routes_by_token_ids_in_training_and_incremental_decoding(build_translation_model, translation_batch):
    model = build_translation_model(router="hash").eval()
    sample = translation_batch(4, 4)
    inputs = sample["net_input"]
    encoded = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
    routing = model.encoder.layers[0].fc1.moe.routing
    assert torch.equal(routing.expert_index.flatten(), hash_ids(inputs["src_tokens"].t().flatten(), 4))
    previous = inputs["prev_output_tokens"]
    whole, _ = model.decoder(previous, encoder_out=encoded)
    state, steps = {}, []
    for length in range(1, previous.size(1) + 1):
        steps.append(model.decoder(previous[:, :length], encoder_out=encoded, incremental_state=state)[0])
        routing = model.decoder.layers[0].fc1.moe.routing
        assert torch.equal(routing.expert_index.flatten(), hash_ids(previous[:, length - 1], 4))
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_expert_choice_is_refused_in_the_decoder_unless_forced(build_translation_model):
    with pytest.raises(ConfigurationError, match="--moe-encoder-only"):
        build_translation_model(router="expert_choice")
    assert len(moe_layers(build_translation_model(router="expert_choice", moe_encoder_only=True))) == 1
    assert len(moe_layers(build_translation_model(router="expert_choice", force_expert_choice=True))) == 2


def test_options_reach_the_layers(build_translation_model):
    model = build_translation_model(
        router="switch", capacity_factor=1.5, moe_bias_update_rate=0.01, num_shared_experts=2, expert_activation="geglu"
    )
    for layer in moe_layers(model):
        assert layer.gate.capacity_factor == 1.5 and layer.gate.balancer.rate == 0.01
        assert layer.experts.gated and layer.shared_experts.gated
        assert layer.shared_experts.weight_out.shape == (1, 64, 16)


def test_shared_experts_are_active_parameters(build_translation_model):
    plain, shared = (build_translation_model(router="switch", num_shared_experts=n) for n in (0, 3))
    added = sum(p.numel() for layer in moe_layers(shared) for p in layer.shared_experts.parameters())
    assert [b - a for a, b in zip(parameter_counts(plain), parameter_counts(shared))] == [added, added]


def test_the_glam_architecture_is_gshard_with_gated_experts_in_every_other_layer():
    from argparse import Namespace

    from fairseq_sparsemixer.plugin.models.transformer_moe import glam

    args = Namespace(num_experts=64)
    glam(args)
    assert (args.router, args.moe_freq, args.expert_activation, args.num_experts) == ("gshard", 2, "geglu", 64)
