"""The fine-tuning loss with the routers' auxiliary losses, and how its metrics are aggregated."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq_sparsemixer.criterions.moe_sentence_prediction import MoESentencePredictionConfig, MoESentencePredictionCriterion

from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.plugin.models import roberta_moe
from fairseq_sparsemixer.plugin.models.roberta_moe import RobertaMoEModel


def criterion_of(dictionary, **flags):
    labels = Dictionary()
    labels.add_symbol("0")
    labels.add_symbol("1")
    task = SimpleNamespace(target_dictionary=dictionary, label_dictionary=labels)
    return MoESentencePredictionCriterion.build_criterion(MoESentencePredictionConfig(**flags), task)


def test_the_loss_is_the_cross_entropy_of_the_labels_plus_the_auxiliary_losses(masked_lm_task, masked_lm_batch):
    args = Namespace(tokens_per_sample=32, num_experts=4)
    roberta_moe.tiny(args)
    model = RobertaMoEModel.build_model(args, masked_lm_task)
    model.register_classification_head("sentence_classification_head", num_classes=2)
    sample = {**masked_lm_batch(9, 4, 2), "target": torch.tensor([[1], [0], [1]])}
    loss, sample_size, log = criterion_of(masked_lm_task.dictionary, moe_balance_loss_weight=0.5)(model.eval(), sample)
    ((_, layer),) = named_moe_layers(model)
    logits, _ = model(sample["net_input"]["src_tokens"], classification_head_name="sentence_classification_head")
    expected = -logits.double().log_softmax(-1).gather(1, sample["target"]).sum()
    assert sample_size == 3 and layer.routing.statistics()["tokens"] == 9 + 4 + 2
    torch.testing.assert_close(log["loss"].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    balance = layer.routing.aux_losses["balance"].double()
    torch.testing.assert_close(loss.double(), expected + 3 * 0.5 * balance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flag", ["report_mcc", "report_acc_and_f1", "report_pearson_and_spearman"])
def test_scores_that_need_all_predictions_are_gathered_not_summed(dictionary, flag):
    if not hasattr(MoESentencePredictionConfig, flag):
        pytest.skip(f"the installed fairseq has no {flag}")
    assert criterion_of(dictionary).logging_outputs_can_be_summed()
    assert not criterion_of(dictionary, **{flag: True}).logging_outputs_can_be_summed()
