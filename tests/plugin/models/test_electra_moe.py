"""ELECTRA: shared embeddings, sizes, sampling, fine-tuning."""

from argparse import Namespace

import pytest
import torch
from fairseq.models import build_model
from omegaconf import OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.plugin.models import electra_moe
from fairseq_sparsemixer.plugin.models.electra_moe import ElectraMoEModel, corrupt


def args_of(architecture=electra_moe.tiny, **flags):
    args = Namespace(**{"tokens_per_sample": 32, "dropout": 0.0, "attention_dropout": 0.0, "num_experts": 4, **flags})
    architecture(args)
    return args


@pytest.fixture
def build(masked_lm_task):
    return lambda **flags: ElectraMoEModel.build_model(args_of(**flags), masked_lm_task)


def widths(encoder):
    layer = encoder.sentence_encoder.layers[1]  # the second layer has no experts
    return layer.embed_dim, layer.fc1.out_features, layer.self_attn.num_heads


def test_generator_and_discriminator_share_their_embeddings(build, dictionary):
    model = build()
    seen, small = model.encoder.sentence_encoder.embed_tokens, model.generator.sentence_encoder.embed_tokens
    assert seen.shared is small.shared
    assert seen.shared.tokens.weight.shape == (len(dictionary) + 1, 32)  # the dictionary and <mask>
    assert model.generator.lm_head.weight is seen.shared.tokens.weight  # the generator's output is tied as well
    assert (widths(model.encoder), widths(model.generator)) == ((64, 128, 2), (32, 64, 1))


def test_only_the_discriminator_has_experts(build):
    assert [name for name, _ in named_moe_layers(build())] == ["encoder.sentence_encoder.layers.0"]


@pytest.mark.parametrize(
    "architecture, expected, generator",
    [(electra_moe.small, (12, 256, 1024, 4, 128), (64, 256, 1)), (electra_moe.base, (12, 768, 3072, 12, 768), (256, 1024, 4))],
)
def test_sizes_equal_the_papers(architecture, expected, generator):
    """Table 6 of arXiv 2003.10555: layers, hidden size, FFN, heads, embedding size; generator size 1/4 and 1/3."""
    args = args_of(architecture)
    small = electra_moe.generator_args(args)
    widths = (args.encoder_embed_dim, args.encoder_ffn_embed_dim, args.encoder_attention_heads, args.embedding_dim)
    assert (args.encoder_layers, *widths) == expected
    assert (small.encoder_embed_dim, small.encoder_ffn_embed_dim, small.encoder_attention_heads) == generator
    assert small.encoder_layers == args.encoder_layers


def test_samples_follow_the_generators_softmax_and_are_never_padding(dictionary):
    pad, size, draws = dictionary.pad(), len(dictionary), 40_000
    logits = torch.randn(1, size).index_fill(1, torch.tensor(pad), 5.0).expand(draws, size)
    source = torch.full((draws, 1), dictionary.unk())
    target = torch.full((draws, 1), 7)
    tokens, replaced = corrupt(source, target, logits, pad)
    expected = logits[0].double().index_fill(0, torch.tensor(pad), -torch.inf).softmax(0)
    share = torch.bincount(tokens.flatten(), minlength=size) / draws
    assert share[pad] == 0
    assert (share - expected).abs().max() < 4 * (0.25 / draws) ** 0.5  # four standard deviations of a share
    assert torch.equal(replaced, tokens != 7)  # a sample equal to the original word counts as original


def test_only_masked_tokens_change(dictionary):
    source, target = torch.randint(4, 24, (3, 5)), torch.full((3, 5), dictionary.pad())
    target[0, 1], target[2, 4] = 9, 11
    logits = torch.full((2, len(dictionary)), -100.0)
    logits[0, 9], logits[1, 12] = 100.0, 100.0
    tokens, replaced = corrupt(source, target, logits, dictionary.pad())
    expected = source.clone()
    expected[0, 1], expected[2, 4] = 9, 12
    assert torch.equal(tokens, expected)
    assert replaced.nonzero().tolist() == [[2, 4]]


def test_no_gradient_passes_through_the_samples(build, masked_lm_batch):
    model, sample = build(), masked_lm_batch(9, 4)
    model(**sample["net_input"], target=sample["target"]).scores.sum().backward()
    shared = {id(p) for p in model.encoder.parameters()}
    assert all(p.grad is None for p in model.generator.parameters() if id(p) not in shared)


def test_padding_is_never_routed_and_changes_no_score(build, masked_lm_batch):
    model = build().eval()
    sample = masked_lm_batch(9, 4)
    output = model(**sample["net_input"], target=sample["target"])
    assert [layer.routing.statistics()["tokens"] for _, layer in named_moe_layers(model)] == [9 + 4]
    assert output.generator_logits.size(0) == sample["target"].ne(1).sum() and output.scores.shape == (2, 9)
    tokens = sample["net_input"]["src_tokens"]
    torch.testing.assert_close(model(tokens)[0][1:, :4], model(tokens[1:, :4])[0], rtol=1e-5, atol=1e-6)


def test_a_classification_head_uses_the_pretrained_discriminator_without_generator(build, masked_lm_batch):
    pretrained, model = build().eval(), build().eval()
    model.register_classification_head("glue", num_classes=3)
    model.load_state_dict(pretrained.state_dict())
    assert model.generator is None and not any(name.startswith("generator") for name, _ in model.named_parameters())
    tokens = masked_lm_batch(6, 3)["net_input"]["src_tokens"]
    assert torch.equal(model(tokens, features_only=True)[0], pretrained(tokens, features_only=True)[0])
    assert model(tokens, classification_head_name="glue")[0].shape == (2, 3)


@pytest.mark.parametrize("size", [0.01, 0.75])
def test_an_invalid_generator_size_gives_a_one_line_error(build, size):
    with pytest.raises(ConfigurationError, match=f"--generator-size {size}"):
        build(encoder_embed_dim=66, encoder_attention_heads=6, generator_size=size)


def test_a_hydra_config_builds_the_model_and_unknown_names_are_refused(masked_lm_task):
    model = build_model(OmegaConf.create({"_name": "electra_moe_tiny", "num_experts": 2}), masked_lm_task)
    assert [layer.gate.num_experts for _, layer in named_moe_layers(model)] == [2]
    with pytest.raises(ConfigurationError, match="did you mean num_experts"):
        build_model(OmegaConf.create({"_name": "electra_moe_tiny", "num_expert": 2}), masked_lm_task)
