"""Facts inspected in a checkpoint, compared with the model it was saved from."""

from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe import onednn
from fairseq_sparsemixer.moe.layer import MoELayer
from fairseq_sparsemixer.plugin.models import electra_moe, parameter_counts, roberta_moe, transformer_lm_moe
from fairseq_sparsemixer.plugin.models.electra_moe import ElectraMoEModel
from fairseq_sparsemixer.plugin.models.roberta_moe import RobertaMoEModel
from fairseq_sparsemixer.plugin.models.transformer_lm_moe import TransformerLanguageModelMoE, TransformerLanguageModelMoEConfig
from fairseq_sparsemixer.tools.inspection import inspect_checkpoint, mean_cosine


def masked_lm_args(architecture, **flags):
    args = Namespace(**{"tokens_per_sample": 32, "num_experts": 4, **flags})
    architecture(args)
    return args


def language_model_args(**flags):
    small = dict(decoder_layers=2, decoder_embed_dim=16, decoder_ffn_embed_dim=32, decoder_attention_heads=2, num_experts=4)
    args = Namespace(**{**small, **flags})
    transformer_lm_moe.tiny(args)
    cfg = TransformerLanguageModelMoEConfig.from_namespace(args)
    cfg.tokens_per_sample = cfg.max_target_positions = 32
    return cfg


@pytest.fixture
def saved(build_translation_model, tmp_path):
    """saved(**flags) -> (model, path of its checkpoint)."""

    def save(**flags):
        model = build_translation_model(**flags)
        args = Namespace(**{"router": "sparsemixer", "num_experts": 4, **flags})
        torch.save({"args": args, "model": model.state_dict(), "optimizer_history": [{"num_updates": 7}]}, tmp_path / "m.pt")
        return model, str(tmp_path / "m.pt")

    return save


@pytest.mark.parametrize(
    "flags, top_k",
    [
        ({}, 1),
        ({"router": "switch", "moe_freq": 1}, 1),
        ({"router": "sparsemixer_v2", "moe_top_k": 2, "share_decoder_input_output_embed": True}, 2),
        ({"router": "dense"}, 0),
    ],
)
def test_parameter_counts_equal_the_models(saved, flags, top_k):
    model, path = saved(**flags)
    report = inspect_checkpoint(path)
    assert (report.parameters, report.active) == parameter_counts(model)
    assert (report.router, report.top_k, report.updates) == (flags.get("router", "sparsemixer"), top_k, 7)
    assert len(report.layers) == sum(isinstance(module, MoELayer) for module in model.modules())


def test_flops_are_two_per_weight_of_a_tokens_matrices(saved):
    attention, gate, expert, dense = 4 * 16 * 16, 4 * 16, 2 * 16 * 32, 2 * 16 * 32
    _, path = saved()
    parts = inspect_checkpoint(path).parts
    assert parts["encoder"].flops == 2 * (2 * attention + gate + expert + dense)
    assert parts["decoder"].flops == 2 * (4 * attention + gate + expert + dense + 24 * 16)  # 24 words


def counted(monkeypatch, run):
    """FLOPs of run()'s matrix products counted by torch, without the batched products inside attention."""
    monkeypatch.setattr(onednn, "onednn_is_right", lambda: False)  # the counter does not know oneDNN's products
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if operation in (torch.ops.aten.mm, torch.ops.aten.addmm))


def saved_of(model, path, args):
    torch.save({"args": args, "model": model.state_dict()}, path)
    return inspect_checkpoint(str(path))


ROUTERS = [
    {"router": "sparsemixer"},
    {"router": "dense"},
    {"router": "gshard", "capacity_factor": float("inf"), "expert_activation": "geglu"},
    {"router": "noisy_topk", "moe_freq": 1},
    {"router": "hash"},
    {"router": "sparsemixer_v2", "moe_bias_update_rate": 0.001, "moe_top_k": 2},
    {"router": "switch", "num_shared_experts": 2},
]


@pytest.mark.parametrize("flags", ROUTERS)
def test_flops_of_a_masked_language_model_equal_those_of_its_forward(masked_lm_task, monkeypatch, tmp_path, flags):
    args = masked_lm_args(roberta_moe.tiny, **flags)
    model = RobertaMoEModel.build_model(args, masked_lm_task).train()
    report = saved_of(model, tmp_path / "m.pt", args)
    tokens = torch.randint(4, 24, (3, 7))
    assert report.parts["encoder"].flops * 21 == counted(monkeypatch, lambda: model(tokens))
    assert (report.parts["encoder"].parameters, report.parts["encoder"].active) == parameter_counts(model)


@pytest.mark.parametrize("flags", [{"router": "sparsemixer"}, {"router": "expert_choice", "capacity_factor": 1.5}])
def test_electras_generator_and_discriminator_are_counted_separately(masked_lm_task, monkeypatch, tmp_path, flags):
    args = masked_lm_args(electra_moe.tiny, **flags)
    model = ElectraMoEModel.build_model(args, masked_lm_task).train()
    report = saved_of(model, tmp_path / "m.pt", args)
    tokens = torch.randint(4, 24, (4, 8))
    assert set(report.parts) == {"generator", "discriminator"}
    for name, part in (("generator", model.generator), ("discriminator", model.encoder)):
        assert report.parts[name].flops * 32 == counted(monkeypatch, lambda part=part: part(tokens))
        assert (report.parts[name].parameters, report.parts[name].active) == parameter_counts(part)
    assert (report.parameters, report.active) == parameter_counts(model)


def test_a_fine_tuned_model_is_counted_without_pretraining_heads(masked_lm_task, monkeypatch, tmp_path):
    args = masked_lm_args(electra_moe.tiny)
    model = ElectraMoEModel.build_model(args, masked_lm_task).train()
    model.register_classification_head("glue", num_classes=3)
    report = saved_of(model, tmp_path / "m.pt", args)
    tokens = torch.randint(4, 24, (3, 7))
    assert report.parts["encoder"].flops * 21 == counted(monkeypatch, lambda: model(tokens, features_only=True))


BANDS = {"adaptive_softmax_cutoff": "8,14", "adaptive_softmax_factor": 2, "criterion": "adaptive_loss"}
BANDED_INPUT = {"adaptive_input": True, "adaptive_input_cutoff": "8,14", "adaptive_input_factor": 2, "decoder_input_dim": 16}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"share_decoder_input_output_embed": True},
        {"router": "dense"},
        BANDS,
        {**BANDS, **BANDED_INPUT},
        {**BANDS, **BANDED_INPUT, "tie_adaptive_weights": True, "tie_adaptive_proj": True},
    ],
)
def test_flops_of_a_language_model_equal_those_of_its_forward(language_modeling_task, monkeypatch, tmp_path, flags):
    args = language_model_args(**flags)
    model = TransformerLanguageModelMoE.build_model(args, language_modeling_task).train()
    report = saved_of(model, tmp_path / "m.pt", Namespace(**vars(args)))
    tokens = torch.randint(4, 8, (3, 7))  # words of the first cutoff band

    def run():
        output = model(tokens)
        if model.decoder.adaptive_softmax is not None:
            model.decoder.adaptive_softmax.get_log_prob(output[0], None)  # for all words

    assert report.parts["decoder"].flops * 21 == counted(monkeypatch, run)
    assert (report.parameters, report.active) == parameter_counts(model)


def test_similarities_are_means_over_pairs(saved):
    model, path = saved()
    layer = inspect_checkpoint(path).layers[0]
    moe = model.encoder.layers[0].fc1.moe
    rows = [torch.cat([p[e].flatten() for p in moe.experts.parameters()]) for e in range(4)]
    pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0) for i in range(4) for j in range(i)]
    assert layer.expert_similarity == pytest.approx((sum(pairs) / 6).item(), abs=1e-5)
    assert layer.router_similarity == pytest.approx(mean_cosine(moe.gate.projection.weight.detach()), abs=1e-6)
    assert mean_cosine(torch.ones(3, 5)) == pytest.approx(1) and mean_cosine(torch.ones(1, 5)) is None


def test_a_file_without_a_model_is_refused(tmp_path):
    torch.save({"weights": 1}, tmp_path / "m.pt")
    with pytest.raises(ConfigurationError, match="m.pt is not a fairseq checkpoint"):
        inspect_checkpoint(str(tmp_path / "m.pt"))
