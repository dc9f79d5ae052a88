"""The masked-LM loss with the routers' auxiliary losses."""

from argparse import Namespace

import torch
from fairseq_sparsemixer.criterions.moe_masked_lm import MoEMaskedLmConfig, MoEMaskedLmLoss

from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.plugin.models import roberta_moe
from fairseq_sparsemixer.plugin.models.roberta_moe import RobertaMoEModel


def test_the_loss_is_the_cross_entropy_of_masked_tokens_plus_the_auxiliary_losses(masked_lm_task, masked_lm_batch):
    args = Namespace(tokens_per_sample=32, num_experts=4)
    roberta_moe.tiny(args)
    model, sample = RobertaMoEModel.build_model(args, masked_lm_task).eval(), masked_lm_batch(9, 4)
    cfg = MoEMaskedLmConfig(tpu=False, moe_balance_loss_weight=0.5, moe_z_loss_weight=0.25)
    loss, sample_size, log = MoEMaskedLmLoss.build_criterion(cfg, masked_lm_task)(model, sample)
    ((_, layer),) = named_moe_layers(model)
    masked = sample["target"] != masked_lm_task.dictionary.pad()
    log_probabilities = model(sample["net_input"]["src_tokens"])[0].double().log_softmax(-1)
    expected = -log_probabilities[masked].gather(1, sample["target"][masked].unsqueeze(1)).sum()
    aux = 0.5 * layer.routing.aux_losses["balance"] + 0.25 * layer.routing.aux_losses["router_z"]
    assert sample_size == masked.sum() == 4
    torch.testing.assert_close(log["loss"].double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), expected + 4 * aux.double(), rtol=1e-5, atol=1e-6)
