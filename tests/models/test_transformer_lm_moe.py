"""The language model: which layers route, padding, incremental decoding, adaptive softmax, and a real text."""

from argparse import Namespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_sparsemixer.criterions.auxiliary_losses import moe_layers
from fairseq_sparsemixer.criterions.moe_adaptive_loss import MoEAdaptiveLoss, MoEAdaptiveLossConfig
from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterion, MoECrossEntropyCriterionConfig
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.models import transformer_lm_moe
from fairseq_sparsemixer.models.transformer_lm_moe import TransformerLanguageModelMoE, TransformerLanguageModelMoEConfig

TINY = dict(decoder_layers=3, decoder_embed_dim=16, decoder_ffn_embed_dim=32, decoder_attention_heads=2, num_experts=4)


@pytest.fixture(scope="module")
def task(dictionary):
    return LanguageModelingTask(LanguageModelingConfig(tokens_per_sample=32), dictionary)


def flags_of(architecture, **flags):
    args = Namespace(**{"dropout": 0.0, "attention_dropout": 0.0, **flags})
    architecture(args)
    cfg = TransformerLanguageModelMoEConfig.from_namespace(args)
    cfg.criterion = flags.get("criterion")
    cfg.tokens_per_sample = cfg.max_target_positions = 32
    return cfg


def build(task, architecture=transformer_lm_moe.tiny, **flags):
    return TransformerLanguageModelMoE.build_model(flags_of(architecture, **{**TINY, **flags}), task)


def batch_of(dictionary, *lengths):
    """A sample as fairseq's language modelling task collates it: random words, padded on the right."""
    source = torch.full((len(lengths), max(lengths)), dictionary.pad())
    target = source.clone()
    for row, length in enumerate(lengths):
        words = torch.randint(dictionary.nspecial, len(dictionary), (length + 1,))
        source[row, :length], target[row, :length] = words[:-1], words[1:]
    return {"net_input": {"src_tokens": source}, "target": target, "ntokens": sum(lengths), "id": torch.arange(len(lengths))}


def test_every_second_layer_routes_from_the_first_on(task, dictionary):
    model = build(task)
    assert [name for name, _ in moe_layers(model)] == ["decoder.layers.0", "decoder.layers.2"]
    logits, _ = model(batch_of(dictionary, 5, 3)["net_input"]["src_tokens"])
    assert logits.shape == (2, 5, len(dictionary))


def test_router_dense_is_the_plain_model(task, dictionary):
    model = build(task, router="dense")
    plain = TransformerLanguageModel.build_model(flags_of(transformer_lm_moe.tiny, **TINY), task)
    plain.load_state_dict(model.state_dict())
    tokens = batch_of(dictionary, 5, 3)["net_input"]["src_tokens"]
    assert torch.equal(model.eval()(tokens)[0], plain.eval()(tokens)[0])


@pytest.mark.parametrize("router", ["switch", "sparsemixer"])
def test_incremental_decoding_equals_full_context(task, dictionary, router):
    model = build(task, router=router).eval()
    tokens = batch_of(dictionary, 7, 7, 7)["net_input"]["src_tokens"]
    full, _ = model(tokens)
    state = {}
    steps = [model.decoder(tokens[:, : i + 1], incremental_state=state)[0] for i in range(tokens.size(1))]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-5, atol=1e-6)


def test_padding_is_never_routed_and_changes_no_token(task, dictionary):
    model = build(task).eval()
    tokens = batch_of(dictionary, 9, 4)["net_input"]["src_tokens"]
    together, _ = model(tokens)
    for _, layer in moe_layers(model):
        assert layer.routing.statistics()["tokens"] == 9 + 4
    alone, _ = model(tokens[1:, :4])
    torch.testing.assert_close(together[1:, :4], alone, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient(task, dictionary):
    models = [build(task, checkpoint_activations=flag, share_decoder_input_output_embed=True) for flag in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    sample = batch_of(dictionary, 9, 4)
    for model in models:
        torch.manual_seed(3)
        criterion = MoECrossEntropyCriterion.build_criterion(MoECrossEntropyCriterionConfig(sentence_avg=False), task)
        criterion(model.train(), sample)[0].backward()
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters()):
        assert one.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)


def adaptive_criterion(task, **flags):
    cfg = MoEAdaptiveLossConfig(sentence_avg=False, ddp_backend="legacy_ddp")
    for name, value in flags.items():
        setattr(cfg, name, value)
    return MoEAdaptiveLoss.build_criterion(cfg, task)


def test_wiki103_adaptive_loss_is_the_negative_log_likelihood_plus_the_auxiliary_loss(task, dictionary):
    cutoffs = dict(adaptive_input_cutoff="8,16", adaptive_softmax_cutoff="8,16", adaptive_softmax_dropout=0.0)
    model = build(task, transformer_lm_moe.wiki103, **cutoffs).eval()
    sample = batch_of(dictionary, 9, 4)
    for second_of_cluster in (9, 17):  # fairseq's adaptive_loss takes the second word of a rare cluster for padding
        sample["target"][sample["target"] == second_of_cluster] += 1
    loss, sample_size, log = adaptive_criterion(task, moe_balance_loss_weight=0.5)(model, sample)
    log_probabilities = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
    nll = -log_probabilities.gather(2, sample["target"].unsqueeze(2)).squeeze(2)[sample["target"] != dictionary.pad()].sum()
    balance = sum(layer.routing.aux_losses["balance"] for _, layer in moe_layers(model))
    assert sample_size == 13
    torch.testing.assert_close(log["loss"].squeeze(), nll.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.squeeze(), nll + 13 * 0.5 * balance, rtol=1e-5, atol=1e-5)
    embeddings, softmax = model.decoder.embed_tokens.embeddings, model.decoder.adaptive_softmax
    assert softmax.head.word_proj.weight is embeddings[0][0].weight  # tied
    loss.backward()
    assert all(layer.experts.weight_in.grad.abs().sum() > 0 for _, layer in moe_layers(model))


def test_gpt_sizes_are_those_of_the_papers():
    """GPT-2 (Radford et al., 2019), Table 2: 12 x 768 and 24 x 1024; each feed-forward network is four times as wide."""
    for architecture, layers, width in ((transformer_lm_moe.gpt, 12, 768), (transformer_lm_moe.gpt2_small, 24, 1024)):
        cfg = flags_of(architecture)
        assert (cfg.decoder_layers, cfg.decoder_embed_dim, cfg.decoder_ffn_embed_dim) == (layers, width, 4 * width)


def test_expert_dropout_is_the_experts_own(task):
    for flags, expected in ((dict(activation_dropout=0.2), 0.2), (dict(activation_dropout=0.2, expert_dropout=0.4), 0.4)):
        model = build(task, **flags)
        assert [layer.experts.dropout for _, layer in moe_layers(model)] == [expected, expected]
        assert model.decoder.layers[1].activation_dropout_module.p == 0.2


@pytest.mark.parametrize(
    "flags, named",
    [({"expert_dropout": 1.0}, "--expert-dropout 1.0"), ({"scale_fc": True}, "--scale-fc"), ({"router": "x"}, "--router x")],
)
def test_bad_options_end_in_one_sentence(task, flags, named):
    with pytest.raises(ConfigurationError, match=named):
        build(task, **flags)


def test_training_with_the_plain_criterion_is_warned_of(task, caplog):
    build(task, criterion="cross_entropy")
    assert "use --criterion moe_cross_entropy" in caplog.text


def test_the_adaptive_loss_says_what_it_needs(task, dictionary):
    with pytest.raises(ConfigurationError, match="--criterion moe_cross_entropy"):
        adaptive_criterion(task)(build(task), batch_of(dictionary, 3))
    with pytest.raises(ConfigurationError, match="--ddp-backend legacy_ddp"):
        adaptive_criterion(task, ddp_backend="pytorch_ddp")


def unigram_bits(folder):
    """Bits a token of `valid` under the relative frequencies of `train` (add-one): what counting words alone can do."""
    dictionary = Dictionary.load(str(folder / "dict.txt"))

    def words(split):
        text = (folder.parent / f"{split}.txt").read_text(encoding="utf-8").replace("\n", " </s> ")
        return dictionary.encode_line(text, add_if_not_exist=False, append_eos=False).long()

    counts = torch.bincount(words("train"), minlength=len(dictionary)) + 1
    return -(counts / counts.sum()).log2()[words("valid")].mean().item()


def test_training_beats_word_counts_and_evaluation_agrees(run_fairseq, wikitext, tmp_path):
    run_fairseq(
        "train", wikitext, "--task", "language_modeling", "--arch", "transformer_lm_moe_tiny", "--num-experts", 4,
        "--router", "sparsemixer", "--criterion", "moe_cross_entropy", "--share-decoder-input-output-embed",
        "--tokens-per-sample", 64, "--max-tokens", 1024, "--optimizer", "adam", "--lr", 0.01, "--clip-norm", 1.0,
        "--max-update", 200, "--save-dir", tmp_path, "--no-epoch-checkpoints", "--log-format", "json", "--seed", 1,
    )  # fmt: skip
    from fairseq import checkpoint_utils

    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    evaluate = ["eval_lm", wikitext, "--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "valid", "--max-tokens", 1024]
    by_block = run_fairseq(*evaluate, "--tokens-per-sample", 64)["loss"].item()
    in_context = run_fairseq(*evaluate, "--tokens-per-sample", 64, "--context-window", 32)["loss"].item()
    counted = unigram_bits(wikitext)
    assert by_block < counted - 0.5
    assert by_block == pytest.approx(state["extra_state"]["val_loss"], abs=0.01)  # which is rounded
    assert in_context == pytest.approx(by_block, abs=0.05)  # so small a model makes little of context
