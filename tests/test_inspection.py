"""What is read off a checkpoint, against the model it was saved from."""

from argparse import Namespace

import pytest
import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.inspection import inspect_checkpoint, mean_cosine
from fairseq_sparsemixer.models import parameter_counts
from fairseq_sparsemixer.moe_layer import MoELayer


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
def test_parameters_are_those_of_the_model(saved, flags, top_k):
    model, path = saved(**flags)
    report = inspect_checkpoint(path)
    assert (report.parameters, report.active) == parameter_counts(model)
    assert (report.router, report.top_k, report.updates) == (flags.get("router", "sparsemixer"), top_k, 7)
    assert len(report.layers) == sum(isinstance(module, MoELayer) for module in model.modules())


def test_flops_are_two_for_each_weight_of_a_tokens_matrices(saved):
    attention, gate, expert, dense = 4 * 16 * 16, 4 * 16, 2 * 16 * 32, 2 * 16 * 32
    _, path = saved()
    report = inspect_checkpoint(path)
    assert report.flops["encoder"] == 2 * (2 * attention + gate + expert + dense)
    assert report.flops["decoder"] == 2 * (4 * attention + gate + expert + dense + 24 * 16)  # 24 words


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
    with pytest.raises(ConfigurationError, match="m.pt is no checkpoint of fairseq"):
        inspect_checkpoint(str(tmp_path / "m.pt"))
