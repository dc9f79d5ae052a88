"""ELECTRA's losses and metrics against their formulas, and training on a synthetic language."""

import math
from argparse import Namespace

import pytest
import torch
from fairseq.logging import metrics
from fairseq_sparsemixer.criterions.electra import ElectraCriterion, ElectraCriterionConfig

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.plugin.models import electra_moe
from fairseq_sparsemixer.plugin.models.electra_moe import ElectraMoEModel


def criterion_of(task, **flags):
    cfg = ElectraCriterionConfig(mask_prob=0.15)
    for name, value in flags.items():
        setattr(cfg, name, value)
    return ElectraCriterion.build_criterion(cfg, task)


@pytest.fixture
def model(masked_lm_task):
    args = Namespace(tokens_per_sample=32, dropout=0.0, attention_dropout=0.0, num_experts=4, router="switch", jitter_eps=0.0)
    electra_moe.tiny(args)
    return ElectraMoEModel.build_model(args, masked_lm_task).eval()


def test_the_loss_equals_the_papers(model, masked_lm_task, masked_lm_batch):
    sample = masked_lm_batch(9, 4)
    source, target, pad = sample["net_input"]["src_tokens"], sample["target"], masked_lm_task.dictionary.pad()
    torch.manual_seed(5)
    loss, tokens, log = criterion_of(masked_lm_task, moe_balance_loss_weight=0.5)(model, sample)
    balance = sum(layer.routing.aux_losses["balance"] for _, layer in named_moe_layers(model)).item()
    torch.manual_seed(5)
    output = model(**sample["net_input"], target=target)
    mlm, rtd, row = 0.0, 0.0, 0
    for sentence, position in (source != pad).nonzero().tolist():
        score = output.scores[sentence, position].double()
        right = torch.sigmoid(score if output.replaced[sentence, position] else -score)
        rtd -= math.log(right)
        if target[sentence, position] != pad:
            mlm -= output.generator_logits[row].double().log_softmax(0)[target[sentence, position]].item()
            row += 1
    assert tokens == 13 and log["masked"] == row == 4
    assert log["mlm_loss"].item() == pytest.approx(mlm, rel=1e-5)
    assert log["rtd_loss"].item() == pytest.approx(rtd, rel=1e-5)
    assert log["loss"].item() == pytest.approx(mlm / 0.15 + 50 * rtd, rel=1e-5)
    assert loss.item() == pytest.approx(mlm / 0.15 + 50 * rtd + 13 * 0.5 * balance, rel=1e-5)


def test_losses_of_two_batches_sum(model, masked_lm_task, masked_lm_batch):
    """Regardless of their shares of masked tokens: ranks and gradient accumulation rely on it."""
    criterion, samples = criterion_of(masked_lm_task, moe_balance_loss_weight=0.0), [masked_lm_batch(9, 4), masked_lm_batch(2)]
    model.generator.lm_head.bias.data[7] = 1000.0  # always sampled, so nothing is random
    parts = [criterion(model, sample) for sample in samples]
    whole = {
        "net_input": {"src_tokens": stack([sample["net_input"]["src_tokens"] for sample in samples])},
        "target": stack([sample["target"] for sample in samples]),
    }
    loss, tokens, _ = criterion(model, whole)
    assert tokens == sum(part[1] for part in parts)
    assert loss.item() == pytest.approx(sum(part[0].item() for part in parts), rel=1e-5)


def stack(batches):
    width = max(batch.size(1) for batch in batches)
    return torch.cat([torch.nn.functional.pad(batch, (0, width - batch.size(1)), value=1) for batch in batches])


def test_every_parameter_gets_a_gradient(model, masked_lm_task, masked_lm_batch):
    """torch's DistributedDataParallel requires it, even if no token is masked."""
    for sample in (masked_lm_batch(9, 4), masked_lm_batch(1)):
        model.zero_grad()
        criterion_of(masked_lm_task)(model, sample)[0].backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_batch_without_masked_tokens_trains_only_the_discriminator(model, masked_lm_task, masked_lm_batch):
    sample = masked_lm_batch(1)  # the first token is not masked
    loss, _, log = criterion_of(masked_lm_task)(model, sample)
    loss.backward()
    assert log["masked"] == 0 and log["mlm_loss"] == 0 and torch.isfinite(loss)


def test_metrics_are_ratios_of_sums():
    counts = dict(
        loss=20.0, mlm_loss=8 * math.log(2), rtd_loss=3.0, masked=8, mlm_correct=2, rtd_flagged=5, replaced=4, rtd_hits=3,
        rtd_correct=37, ntokens=40, sample_size=40,
    )  # fmt: skip
    with metrics.aggregate() as meters:
        ElectraCriterion.reduce_metrics([{name: value / 2 for name, value in counts.items()}] * 2)
    figures = meters.get_smoothed_values()
    expected = dict(mlm_loss=1.0, ppl=2.0, mlm_accuracy=25, rtd_accuracy=92.5, rtd_precision=60, rtd_recall=75)
    expected.update(loss=20 / 40 * math.log2(math.e), rtd_loss=3 / 40 * math.log2(math.e))  # in bits
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=5e-4)


def test_a_negative_weight_is_refused(masked_lm_task):
    for flag, value in (
        ("rtd_weight", -1),
        ("rtd_weight", math.nan),
        ("rtd_weight", math.inf),
        ("mask_prob", 0.0),
        ("mask_prob", math.nan),
    ):
        with pytest.raises(ConfigurationError, match=f"--{flag.replace('_', '-')} {value} must be"):
            criterion_of(masked_lm_task, **{flag: value})


def alternating(task, sentences, length=12):
    """A language of ten words, five for even positions and five for odd ones; 15 % of the words are masked."""
    tokens = task.dictionary.nspecial + torch.randint(5, (sentences, length)) + 5 * (torch.arange(length) % 2)
    masked = torch.rand(tokens.shape) < 0.15
    target = tokens.masked_fill(~masked, task.dictionary.pad())
    return tokens, {"net_input": {"src_tokens": tokens.masked_fill(masked, task.mask_idx)}, "target": target}


def learn(model, parameters, task, steps=150):
    criterion, optimizer = criterion_of(task), torch.optim.Adam(parameters, lr=1e-3)
    model.train()
    for _ in range(steps):
        loss, tokens, _ = criterion(model, alternating(task, 32)[1])
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
    model.eval()


@pytest.mark.slow
def test_the_generator_learns_which_words_a_position_allows(model, masked_lm_task):
    learn(model, model.generator.parameters(), masked_lm_task)
    log = criterion_of(masked_lm_task)(model, alternating(masked_lm_task, 100)[1])[2]
    bits = log["mlm_loss"].item() / log["masked"] / math.log(2)
    assert math.log2(5) - 0.05 < bits < math.log2(5) + 0.3  # five of twenty words are possible


@pytest.mark.slow
def test_the_discriminator_learns_to_detect_wrong_words(model, masked_lm_task):
    learn(model, model.encoder.parameters(), masked_lm_task)  # the untrained generator samples all words
    tokens, _ = alternating(masked_lm_task, 100)
    tokens[:, 5] += 10
    scores, _ = model(tokens)
    wrong, right = scores[:, 5], torch.cat([scores[:, :5], scores[:, 6:]], 1)
    assert (wrong > 0).float().mean() > 0.95
    assert (right > 0).float().mean() < 0.05
