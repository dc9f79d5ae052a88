"""The translation model: which layers route."""

from fairseq_sparsemixer.moe_layer import MoELayer


def test_every_second_layer_routes_from_the_first_on(build_translation_model, translation_batch):
    model = build_translation_model(encoder_layers=3, decoder_layers=2)
    routed = [name for name, module in model.named_modules() if isinstance(module, MoELayer)]
    assert routed == ["encoder.layers.0.fc1.moe", "encoder.layers.2.fc1.moe", "decoder.layers.0.fc1.moe"]
    sample = translation_batch(3, 5)
    logits, _ = model(**sample["net_input"])
    assert logits.shape == (2, 6, 24)
