"""Dense masked language models give the same logits as Roberta of transformers."""

import argparse

import pytest
import torch

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.models.roberta_moe import RobertaMoEModel, tiny

PAD = 1


@pytest.fixture
def checkpoint(save, words_task):
    """checkpoint(**flags) -> (model, path)"""

    def build(**flags):
        args = argparse.Namespace(arch="roberta_moe_tiny", **{"router": "dense", "max_positions": 32, **flags})
        tiny(args)
        model = RobertaMoEModel.build_model(args, words_task)
        if flags.get("head"):
            model.register_classification_head("pairs", num_classes=2)
        return model.eval(), save(args, model)

    return build


@pytest.mark.slow
def test_a_dense_masked_language_model_gives_the_same_logits(transformers, checkpoint, masked_lm_batch, exported):
    model, path = checkpoint()
    other = transformers.AutoModelForMaskedLM.from_pretrained(exported(path)).eval()
    tokens = masked_lm_batch(5, 3, 7)["net_input"]["src_tokens"]
    with torch.no_grad():
        expected, found = model(tokens)[0], other(input_ids=tokens, attention_mask=tokens.ne(PAD)).logits
    assert type(other).__name__ == "RobertaForMaskedLM"
    torch.testing.assert_close(found[tokens != PAD], expected[tokens != PAD], atol=1e-5, rtol=1e-5)


REFUSALS = {
    "experts": ({"router": "switch"}, "--router switch does not fit Roberta of transformers, whose layers have no experts"),
    "norm": ({"encoder_normalize_before": True}, "--encoder-normalize-before does not fit Roberta"),
    "output": ({"untie_weights_roberta": True}, "--untie-weights-roberta does not fit Roberta"),
    "quantised": ({"quant_noise_scalar": 0.1}, "--quant-noise-scalar 0.1 does not fit Roberta"),
    "head": ({"head": True}, "the checkpoint .* has a classification head"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_by_its_flag(case, checkpoint, tmp_path):
    flags, sentence = REFUSALS[case]
    _, path = checkpoint(**flags)
    with pytest.raises(SystemExit, match=f"^fairseq-sparsemixer: {sentence}"):
        main(["export-hf", str(path), str(tmp_path / "hf")])
