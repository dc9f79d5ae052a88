"""Experts that cannot fit into memory are refused before they are made; the bytes are those of the parameters that are made."""

import pytest
import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import EXPERTS
from fairseq_sparsemixer.plugin.models import memory

SETTINGS = [
    {},
    dict(expert_activation="swiglu", expert_ffn_embed_dim=24),
    dict(encoder_moe_layers="0:8,1:2", decoder_moe_layers="none", expert_activation="geglu"),
    dict(moe_freq=1, num_experts=3, moe_encoder_only=True),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_bytes_are_those_of_the_experts_that_are_made(build_translation_model, monkeypatch, settings):
    found, count = [], memory.expert_bytes
    monkeypatch.setattr(memory, "expert_bytes", lambda *arguments: found.append(count(*arguments)) or found[-1])
    model = build_translation_model(router="topk", **settings)
    made = sum(4 * p.numel() for name, p in model.named_parameters() if EXPERTS in name)
    assert found == [made]


def test_more_than_the_machine_has_is_refused_and_exactly_as_much_is_not(build_translation_model, monkeypatch):
    model = build_translation_model(router="topk")
    made = sum(4 * p.numel() for name, p in model.named_parameters() if EXPERTS in name)
    monkeypatch.setattr(memory, "machine_memory", lambda: made)
    build_translation_model(router="topk")
    monkeypatch.setattr(memory, "machine_memory", lambda: made - 1)
    with pytest.raises(ConfigurationError, match=r"--num-experts 4 takes 0.0 GiB for the parameters of experts, and this"):
        build_translation_model(router="topk")
    with pytest.raises(ConfigurationError, match="--num-experts 4 with --encoder-moe-layers 0:8 takes"):
        build_translation_model(router="topk", encoder_moe_layers="0:8")
    monkeypatch.setattr(memory, "machine_memory", lambda: 0)  # unknown
    build_translation_model(router="topk")


@pytest.mark.parametrize("count", [10**9, 2**31 - 1])
def test_absurd_numbers_end_in_one_sentence_at_once(build_translation_model, count):
    with pytest.raises(
        ConfigurationError, match=rf"--num-experts {count} takes [\d,.]+ GiB for .* of memory with swap; give"
    ) as error:
        build_translation_model(router="topk", num_experts=count)
    assert "\n" not in str(error.value)


def test_the_meta_device_takes_any_number(build_translation_model, monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 1)
    with torch.device("meta"):
        assert build_translation_model(router="topk") is not None


def test_memory_is_ram_and_swap(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  2048 kB\nMemFree: 1 kB\nSwapTotal: 1024 kB\n")
    assert memory.machine_memory(tmp_path / "meminfo") == 3 * 2**20
    assert memory.machine_memory(tmp_path / "missing") > 2**20
