"""Monte Carlo dropout (fairseq's --retain-dropout) applies to experts as to dense layers."""

import copy

import pytest
import torch
from fairseq.models.transformer import TransformerModel
from fairseq.modules.fairseq_dropout import FairseqDropout

from fairseq_sparsemixer import build_moe_layer

IN_EXPERTS = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.4, moe_freq=1)


def passes(model, sample, **retain):
    """The outputs of two passes of a model after make_generation_fast_."""
    model.make_generation_fast_(**retain)
    with torch.no_grad():
        return [model(**sample["net_input"])[0] for _ in range(2)]


@pytest.mark.parametrize(
    "flags", [dict(), dict(router="hash", num_shared_experts=1), dict(expert_dropout=0.4, activation_dropout=0.0)]
)
def test_two_passes_differ_only_by_the_dropout_in_experts(build_translation_model, translation_batch, flags):
    model, sample = build_translation_model(**{**IN_EXPERTS, **flags}), translation_batch(3, 6)
    twin = copy.deepcopy(model)
    first, second = passes(model, sample, retain_dropout=True)
    assert (first - second).abs().max() > 1e-3
    first, second = passes(twin, sample)
    assert torch.equal(first, second)


@pytest.mark.parametrize("modules, drops", [
    (["TransformerEncoderLayerBase"], {"encoder"}), (["TransformerDecoderLayerBase"], {"decoder"}),
    (["MultiheadAttention"], set()), (["TransformerEncoderLayerBase", "TransformerDecoderLayerBase"], {"encoder", "decoder"}),
])  # fmt: skip
def test_the_names_of_fairseqs_layers_select_ours(build_translation_model, modules, drops):
    model = build_translation_model(**IN_EXPERTS, num_shared_experts=1)
    model.make_generation_fast_(retain_dropout=True, retain_dropout_modules=modules)
    for name in ("encoder", "decoder"):
        for layer in getattr(model, name).layers:
            found = {layer.fc1.moe.experts.drop_at_inference, layer.fc1.moe.shared_experts.drop_at_inference}
            assert found == {name in drops}


def dropouts(model):
    """The names for --retain-dropout-modules of all fairseq dropouts, except those replaced by experts."""
    modules = model.named_modules()
    return {n: m.module_name for n, m in modules if isinstance(m, FairseqDropout) and not n.endswith("activation_dropout_module")}


@pytest.mark.parametrize("router", ["sparsemixer", "dense"])
def test_every_dropout_has_the_same_name_as_in_fairseqs_transformer(build_translation_model, translation_task, router):
    ours = build_translation_model(router=router)
    assert dropouts(ours) == dropouts(TransformerModel.build_model(ours.args, translation_task))


def test_dropout_at_inference_equals_dropout_in_training():
    layer = build_moe_layer("hash", 8, 16, 4, dropout=0.5, num_shared_experts=2)
    x, outputs = torch.randn(20, 8), []
    for training in (True, False):
        layer.train(training)
        for experts in (layer.experts, layer.shared_experts):
            experts.drop_at_inference = not training
        torch.manual_seed(2)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
