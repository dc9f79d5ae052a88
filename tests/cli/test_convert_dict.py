"""`fairseq-sparsemixer convert --dict`: a model on another dictionary computes the same for the words that both have."""

import copy
import json
from argparse import Namespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.models import electra_moe, roberta_moe, transformer_lm_moe
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEModel, tiny

OLD = [f"w{index}" for index in range(20)]
NEW = [f"new{index}" for index in range(300)] + [f"w{index}" for index in range(19, 4, -1)]  # w0 to w4 are gone
FEW = ["w7", "other", "w3"]
SMALL = dict(encoder_layers=2, decoder_layers=1, encoder_embed_dim=16, encoder_ffn_embed_dim=24, encoder_attention_heads=2)
SMALL.update(decoder_embed_dim=16, decoder_ffn_embed_dim=24, decoder_attention_heads=2, num_experts=4)


def dictionary_of(words):
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word)
    return dictionary


def translation(source, target, **flags):
    args = Namespace(**{**SMALL, "dropout": 0.0, **flags})
    tiny(args)
    task = TranslationTask(TranslationConfig(), dictionary_of(source), dictionary_of(target))
    return TransformerMoEModel.build_model(copy.deepcopy(args), task), args


def language_model(words, **flags):
    cfg = transformer_lm_moe.TransformerLanguageModelMoEConfig(
        decoder_layers=1, decoder_embed_dim=16, decoder_ffn_embed_dim=24, decoder_attention_heads=2, num_experts=4, dropout=0.0
    )
    for name, value in flags.items():
        setattr(cfg, name, value)
    task = LanguageModelingTask(LanguageModelingConfig(tokens_per_sample=32), dictionary_of(words))
    cfg.max_target_positions, cfg.tokens_per_sample = 32, 32
    return transformer_lm_moe.TransformerLanguageModelMoE.build_model(cfg, task), Namespace(**vars(cfg))


def masked_model(module, name):
    def build(words, **flags):
        args = Namespace(**{"tokens_per_sample": 32, "dropout": 0.0, "attention_dropout": 0.0, "num_experts": 4, **flags})
        module.tiny(args)
        task = MaskedLMTask(MaskedLMConfig(tokens_per_sample=32), dictionary_of(words))
        return getattr(module, name).build_model(args, task), args

    return build


MASKED = {
    "roberta": masked_model(roberta_moe, "RobertaMoEModel"),
    "untied roberta": masked_model(roberta_moe, "RobertaMoEModel"),
    "electra": masked_model(electra_moe, "ElectraMoEModel"),
}


@pytest.fixture
def save(tmp_path):
    """save(model, args, task, sides) -> path of a checkpoint, with its dictionaries by name beside it."""

    def saved(model, args, task, dictionaries):
        for name, words in dictionaries.items():
            dictionary_of(words).save(str(tmp_path / name))
        weights = model.double().state_dict()
        state = {"model": weights, "cfg": {"model": args, "task": {"data": str(tmp_path), **task}}, "args": None}
        state["extra_state"] = {"ema": copy.deepcopy(weights)}
        torch.save({**state, "last_optimizer_state": {"state": {}, "param_groups": []}}, tmp_path / "old.pt")
        return str(tmp_path / "old.pt")

    return saved


def convert(path, tmp_path, **flags):
    """The checkpoint moved to these words by flag."""
    words = []
    for flag, given in flags.items():
        dictionary_of(given).save(str(tmp_path / f"{flag}.new"))
        words += [f"--{flag}-dict" if flag != "both" else "--dict", str(tmp_path / f"{flag}.new")]
    (tmp_path / "new.pt").unlink(missing_ok=True)
    assert main(["convert", path, str(tmp_path / "new.pt"), *words, "--json", str(tmp_path / "figures.json")]) == 0
    return read_checkpoint(str(tmp_path / "new.pt"))


def rows(words, of=OLD):
    """The indices of the special symbols and of these words."""
    return torch.tensor([0, 1, 2, 3, *(dictionary_of(of).index(word) for word in words)])


TRANSLATION = {"_name": "translation", "source_lang": "de", "target_lang": "en"}
SHARING = {
    "separate": {},
    "decoder": {"share_decoder_input_output_embed": True},
    "all": {"share_all_embeddings": True, "share_decoder_input_output_embed": True},
}


@pytest.mark.parametrize("sharing", SHARING)
def test_a_translation_model_scores_the_kept_words_the_same(save, tmp_path, sharing):
    model, args = translation(OLD, OLD, **SHARING[sharing])
    state = convert(save(model, args, TRANSLATION, {"dict.de.txt": OLD, "dict.en.txt": OLD}), tmp_path, both=NEW)
    assert json.loads((tmp_path / "figures.json").read_text())["words"]["source"] == {"kept": 19, "new": 300, "lost": 5}
    moved = translation(NEW, NEW, **SHARING[sharing])[0].double()
    moved.load_state_dict(state["model"])
    kept = OLD[5:]
    before, after = rows(kept), rows(kept, NEW)
    positions = torch.randint(4, len(before), (2, 6))
    lengths = torch.tensor([6, 6])
    logits = [
        net.eval()(index[positions], lengths, index[positions])[0][..., index] for net, index in ((model, before), (moved, after))
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)
    ema = state["extra_state"]["ema"]
    assert all(torch.equal(ema[name], value) for name, value in state["model"].items() if "float_tensor" not in name)
    assert state["last_optimizer_state"] is None


def test_new_words_start_as_in_fairseq_and_the_same_for_a_seed(save, tmp_path):
    model, args = translation(OLD, OLD)
    path = save(model, args, TRANSLATION, {"dict.de.txt": OLD, "dict.en.txt": OLD})
    state, again = (convert(path, tmp_path, both=NEW)["model"] for _ in range(2))
    fresh = rows([word for word in NEW if word.startswith("new")], NEW)[4:]
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight"]
    for name in names:
        assert torch.equal(state[name], again[name])
        assert abs(state[name][fresh].std().item() - 16**-0.5) < 0.02  # 4,800 draws: some 6 standard errors
        assert abs(state[name][fresh].mean().item()) < 0.02
    assert not torch.equal(state[names[0]][fresh], state[names[1]][fresh])
    assert state[names[0]][1].abs().max() == 0  # padding


def test_each_side_can_have_a_dictionary_of_its_own(save, tmp_path):
    model, args = translation(OLD, FEW)
    state = convert(save(model, args, TRANSLATION, {"dict.de.txt": OLD, "dict.en.txt": FEW}), tmp_path, target=OLD)
    old, new = model.state_dict(), state["model"]
    assert torch.equal(new["encoder.embed_tokens.weight"], old["encoder.embed_tokens.weight"])
    for name in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        assert torch.equal(new[name][rows(["w7", "w3"])], old[name][rows(["w7", "w3"], FEW)])
    translation(OLD, OLD)[0].double().load_state_dict(new)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_scores_the_kept_words_the_same(save, tmp_path, tied):
    model, args = language_model(OLD, share_decoder_input_output_embed=tied)
    state = convert(save(model, args, {"_name": "language_modeling"}, {"dict.txt": OLD}), tmp_path, both=FEW)
    moved = language_model(FEW, share_decoder_input_output_embed=tied)[0].double()
    moved.load_state_dict(state["model"])
    before, after = rows(["w3", "w7"]), rows(["w3", "w7"], FEW)
    positions = torch.tensor([[4, 5, 5, 4]])
    logits = [net.eval()(index[positions])[0][..., index] for net, index in ((model, before), (moved, after))]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MASKED)
def test_masked_language_models_move_with_their_mask_and_heads(save, tmp_path, kind):
    flags = {"untie_weights_roberta": kind == "untied roberta"}
    model, args = MASKED[kind](OLD, **flags)
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            torch.nn.init.normal_(parameter)
    state = convert(save(model, args, {"_name": "masked_lm"}, {"dict.txt": OLD}), tmp_path, both=FEW)
    moved = MASKED[kind](FEW, **flags)[0].double()
    moved.load_state_dict(state["model"])
    kept = ["w3", "w7", "<mask>"]
    before, after = rows(kept, [*OLD, "<mask>"]), rows(kept, [*FEW, "<mask>"])
    positions = torch.tensor([[4, 6, 5, 4]])
    outputs = []
    for net, index in ((model, before), (moved, after)):
        net = net.eval() if kind != "electra" else net.generator.eval()
        output = net(index[positions], features_only=False)
        outputs.append(output[0][..., index])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    name = "generator.lm_head.bias" if kind == "electra" else "encoder.lm_head.bias"
    assert state["model"][name][5] == 0  # of the new word


def adaptive():
    return language_model(OLD, adaptive_softmax_cutoff="10,20", share_decoder_input_output_embed=False)


@pytest.mark.parametrize(
    "build, words, sentence",
    [
        (lambda: translation(OLD, OLD), ["--dict", "gone.txt"], "the dictionary gone.txt does not exist; give a dict.txt"),
        (lambda: translation(OLD, OLD), ["--dict", "no_word"], "no_word shares no word with .*dict.de.txt"),
        (lambda: translation(OLD, OLD), ["--dict", "a", "--source-dict", "b"], "--source-dict b and --dict a both name"),
        (lambda: translation(OLD, OLD, **SHARING["all"]), ["--target-dict", "few"], "--target-dict few is for .*; give --dict"),
        (lambda: translation(FEW, FEW), ["--dict", "few"], "has 24 words, but the checkpoint 7: it was trained with another"),
        (lambda: translation(OLD, OLD), ["--dict", "few", "--data", "."], "dict.de.txt is not in .; give the folder of the data"),
        (lambda: translation(OLD, OLD, router="hash"), ["--dict", "few"], "has --router hash, which routes by the word's number"),
        (lambda: translation(OLD, OLD), ["--dict", "few", "--seed", "-1"], "--seed -1 must be at least 0"),
        (lambda: translation(OLD, OLD), ["--data", "few"], "--data few is only for --dict"),
        (adaptive, ["--dict", "few"], "has decoder.adaptive_softmax.*: adaptive inputs and softmax keep words by frequency"),
    ],
)
def test_what_cannot_be_moved_gives_one_sentence(save, tmp_path, build, words, sentence, monkeypatch):
    model, args = build()
    path = save(model, args, TRANSLATION, {"dict.de.txt": OLD, "dict.en.txt": OLD})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    dictionary_of(FEW).save("./few")
    dictionary_of(["unheard"]).save("./no_word")
    words = ["elsewhere" if word == "." else word for word in words]
    with pytest.raises(SystemExit, match=sentence.replace("in .;", "in elsewhere;")) as error:
        main(["convert", path, "new.pt", *words])
    assert "\n" not in str(error.value) and not (tmp_path / "new.pt").exists()


def test_a_moved_checkpoint_does_not_name_the_old_data(save, tmp_path):
    """A second move from dictionaries of the same size would otherwise take the first words for those of the checkpoint."""
    model, args = translation(OLD, OLD)
    path = save(model, args, TRANSLATION, {"dict.de.txt": OLD, "dict.en.txt": OLD})
    same_size = list(reversed(OLD))
    one_side = convert(path, tmp_path, source=same_size)
    assert one_side["cfg"]["task"] == {**TRANSLATION, "data": ""}
    with pytest.raises(SystemExit, match="dictionary dict.de.txt is not in a folder that it names; give .* with --data"):
        main(["convert", str(tmp_path / "new.pt"), str(tmp_path / "again.pt"), "--source-dict", str(tmp_path / "dict.de.txt")])
    folder = tmp_path / "new data"
    folder.mkdir()
    for language in ("de", "en"):
        dictionary_of(same_size).save(str(folder / f"dict.{language}.txt"))
    main(["convert", path, str(tmp_path / "moved.pt"), "--dict", str(folder / "dict.en.txt")])
    assert read_checkpoint(str(tmp_path / "moved.pt"))["cfg"]["task"] == {**TRANSLATION, "data": str(folder)}
    main(["convert", str(tmp_path / "moved.pt"), str(tmp_path / "back.pt"), "--dict", str(tmp_path / "dict.de.txt")])
    back, first = (read_checkpoint(str(tmp_path / name)) for name in ("back.pt", "old.pt"))
    for name, value in first["model"].items():
        assert torch.equal(back["model"][name], value), name
