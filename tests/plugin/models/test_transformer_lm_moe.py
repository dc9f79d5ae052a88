"""The language model: layers with experts, padding, incremental decoding, and training on real text."""

import re
from argparse import Namespace

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterion, MoECrossEntropyCriterionConfig

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.plugin.models import transformer_lm_moe
from fairseq_sparsemixer.plugin.models.transformer_lm_moe import TransformerLanguageModelMoE, TransformerLanguageModelMoEConfig

TINY = dict(decoder_layers=3, decoder_embed_dim=16, decoder_ffn_embed_dim=32, decoder_attention_heads=2, num_experts=4)


def flags_of(architecture, **flags):
    args = Namespace(**{"dropout": 0.0, "attention_dropout": 0.0, **flags})
    architecture(args)
    cfg = TransformerLanguageModelMoEConfig.from_namespace(args)
    cfg.tokens_per_sample = cfg.max_target_positions = 32
    return cfg


def build(task, architecture=transformer_lm_moe.tiny, **flags):
    return TransformerLanguageModelMoE.build_model(flags_of(architecture, **{**TINY, **flags}), task)


def test_every_second_layer_has_experts_starting_with_the_first(language_modeling_task, language_modeling_batch):
    model = build(language_modeling_task)
    assert [name for name, _ in named_moe_layers(model)] == ["decoder.layers.0", "decoder.layers.2"]
    logits, _ = model(language_modeling_batch(5, 3)["net_input"]["src_tokens"])
    assert logits.shape == (2, 5, len(language_modeling_task.dictionary))


def test_router_dense_equals_fairseqs_model(language_modeling_task, language_modeling_batch):
    model = build(language_modeling_task, router="dense")
    plain = TransformerLanguageModel.build_model(flags_of(transformer_lm_moe.tiny, **TINY), language_modeling_task)
    plain.load_state_dict(model.state_dict())
    tokens = language_modeling_batch(5, 3)["net_input"]["src_tokens"]
    assert torch.equal(model.eval()(tokens)[0], plain.eval()(tokens)[0])


@pytest.mark.parametrize("router", ["switch", "sparsemixer"])
def test_incremental_decoding_equals_full_context(language_modeling_task, language_modeling_batch, router):
    model = build(language_modeling_task, router=router).eval()
    tokens = language_modeling_batch(7, 7, 7)["net_input"]["src_tokens"]
    full, _ = model(tokens)
    state = {}
    steps = [model.decoder(tokens[:, : i + 1], incremental_state=state)[0] for i in range(tokens.size(1))]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-5, atol=1e-6)


def test_padding_is_never_routed_and_affects_no_token(language_modeling_task, language_modeling_batch):
    model = build(language_modeling_task).eval()
    tokens = language_modeling_batch(9, 4)["net_input"]["src_tokens"]
    together, _ = model(tokens)
    for _, layer in named_moe_layers(model):
        assert layer.routing.statistics()["tokens"] == 9 + 4
    alone, _ = model(tokens[1:, :4])
    torch.testing.assert_close(together[1:, :4], alone, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_no_gradient(language_modeling_task, language_modeling_batch):
    models = [
        build(language_modeling_task, checkpoint_activations=flag, share_decoder_input_output_embed=True)
        for flag in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    sample = language_modeling_batch(9, 4)
    for model in models:
        torch.manual_seed(3)
        criterion = MoECrossEntropyCriterion.build_criterion(
            MoECrossEntropyCriterionConfig(sentence_avg=False), language_modeling_task
        )
        criterion(model.train(), sample)[0].backward()
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters()):
        assert one.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)


def test_gpt_sizes_equal_the_papers():
    """GPT-2 (Radford et al., 2019), Table 2: 12 x 768 and 24 x 1024; each feed-forward network is four times as wide."""
    for architecture, layers, width in ((transformer_lm_moe.gpt, 12, 768), (transformer_lm_moe.gpt2_small, 24, 1024)):
        cfg = flags_of(architecture)
        assert (cfg.decoder_layers, cfg.decoder_embed_dim, cfg.decoder_ffn_embed_dim) == (layers, width, 4 * width)


def test_expert_dropout_applies_only_to_experts(language_modeling_task):
    for flags, expected in ((dict(activation_dropout=0.2), 0.2), (dict(activation_dropout=0.2, expert_dropout=0.4), 0.4)):
        model = build(language_modeling_task, **flags)
        assert [layer.experts.dropout for _, layer in named_moe_layers(model)] == [expected, expected]
        assert model.decoder.layers[1].activation_dropout_module.p == 0.2


@pytest.mark.parametrize(
    "flags, named",
    [({"expert_dropout": 1.0}, "--expert-dropout 1.0"), ({"scale_fc": True}, "--scale-fc"), ({"router": "x"}, "--router x")],
)
def test_bad_options_give_a_one_line_error(language_modeling_task, flags, named):
    with pytest.raises(ConfigurationError, match=named):
        build(language_modeling_task, **flags)


def words_of(split, folder):
    """The word indices of a split, including line ends."""
    text = (folder.parent / f"{split}.txt").read_text(encoding="utf-8").replace("\n", " </s> ")
    return Dictionary.load(str(folder / "dict.txt")).encode_line(text, add_if_not_exist=False, append_eos=False).long()


def unigram_bits(folder):
    """Bits per token of `valid` with add-one unigram frequencies of `train`: the baseline of counting words."""
    valid, train = words_of("valid", folder), words_of("train", folder)
    counts = torch.bincount(train, minlength=len(Dictionary.load(str(folder / "dict.txt")))) + 1
    return -(counts / counts.sum()).log2()[valid].mean().item()


@pytest.fixture(scope="module")
def trained(run_fairseq, wikitext, tmp_path_factory):
    """The folder of a tiny model after 200 updates on WikiText-2."""
    folder = tmp_path_factory.mktemp("trained")
    run_fairseq(
        "train", wikitext, "--task", "language_modeling", "--arch", "transformer_lm_moe_tiny", "--num-experts", 4,
        "--router", "sparsemixer", "--criterion", "moe_cross_entropy", "--share-decoder-input-output-embed",
        "--tokens-per-sample", 64, "--max-tokens", 1024, "--optimizer", "adam", "--lr", 0.01, "--clip-norm", 1.0,
        "--max-update", 200, "--save-dir", folder, "--no-epoch-checkpoints", "--log-format", "json", "--seed", 1,
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_training_beats_word_counts_and_evaluation_agrees(run_fairseq, wikitext, trained):
    state = checkpoint_utils.load_checkpoint_to_cpu(str(trained / "checkpoint_last.pt"))
    evaluate = ["eval_lm", wikitext, "--path", trained / "checkpoint_last.pt", "--gen-subset", "valid", "--max-tokens", 1024]
    by_block = run_fairseq(*evaluate, "--tokens-per-sample", 64)["loss"].item()
    in_context = run_fairseq(*evaluate, "--tokens-per-sample", 64, "--context-window", 32)["loss"].item()
    assert by_block < unigram_bits(wikitext) - 0.5
    assert by_block == pytest.approx(state["extra_state"]["val_loss"], abs=0.01)  # val_loss is rounded
    assert in_context == pytest.approx(by_block, abs=0.05)  # a model this small gains little from context


@pytest.mark.slow
def test_word_perplexity_follows_from_the_loss_of_its_pieces(run_fairseq, wikitext, trained, tmp_path):
    for path in wikitext.glob("valid*"):
        (tmp_path / path.name).symlink_to(path)
    words = re.sub("^the ", "the@@ ", (wikitext / "dict.txt").read_text(encoding="utf-8"), flags=re.M)
    (tmp_path / "dict.txt").write_text(words, encoding="utf-8")
    evaluate = ["eval_lm", tmp_path, "--path", trained / "checkpoint_last.pt", "--gen-subset", "valid", "--max-tokens", 1024]
    evaluate += ["--tokens-per-sample", 64, "--required-batch-size-multiple", 1]
    by_piece = run_fairseq(*evaluate)["loss"].item()
    by_word = run_fairseq(*evaluate, "--post-process", "@@ ")["loss"].item()
    pieces = words_of("valid", wikitext)
    joined = pieces.eq(Dictionary.load(str(tmp_path / "dict.txt")).index("the@@"))
    joined[63::64] = False  # the last piece of a block has no successor
    assert by_word == pytest.approx(by_piece * len(pieces) / (len(pieces) - joined.sum().item()), rel=1e-5)


@pytest.mark.slow
def test_generation_continues_prompts_independently_of_the_batch(run_fairseq, wikitext, trained, tmp_path, capsys):
    prompts = ["the first game of", "in", "he was"]
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")

    def generate(batch_size):
        capsys.readouterr()
        run_fairseq(
            "interactive", wikitext, "--task", "language_modeling", "--path", trained / "checkpoint_last.pt", "--beam", 2,
            "--max-len-b", 12, "--input", tmp_path / "prompts.txt", "--buffer-size", 3, "--batch-size", batch_size,
        )  # fmt: skip
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if line.startswith("H-")]
        return {name: text for name, _, text in lines}

    together = generate(3)
    assert [together[f"H-{i}"].startswith(prompt) for i, prompt in enumerate(prompts)] == [True] * 3
    assert generate(1) == together
