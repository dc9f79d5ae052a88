"""`fairseq-sparsemixer average`: the mean of checkpoints, and the EMA of one."""

import argparse
import json

import pytest
import torch

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.resharding import reshard

E, M = 4, 3
INTEGERS = "encoder.norm.num_batches_tracked"
UPDATES = "encoder.layers.0.fc1.moe.gate.threshold.updates"
BIAS = "encoder.layers.0.fc1.moe.gate.balancer.bias"
TYPE_ONLY = "encoder.embed_positions._float_tensor"


def made_up(seed: int, dtype=torch.float32, updates: int = 1, ema: bool = False, **settings):
    """A random portable checkpoint with tied embeddings, the state of gates and counters."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int):
        return torch.randn(*shape, generator=generator).to(dtype)

    def weights():
        model = {
            "encoder.embed_tokens.weight": random(5, M),
            "encoder.layers.0.fc1.moe.experts.weight_in": random(E, M, 4),
            "encoder.layers.0.fc1.moe.gate.projection.weight": random(E, M),
            BIAS: random(E).float(),
            UPDATES: torch.tensor(float(updates)),
            INTEGERS: torch.tensor(updates),
            TYPE_ONLY: torch.full((1,), float("nan")),  # as fairseq 0.12.2 leaves it
        }
        return {**model, "decoder.output_projection.weight": model["encoder.embed_tokens.weight"]}

    return {
        "model": weights(),
        "cfg": {"model": argparse.Namespace(arch="transformer_moe", encoder_attention_heads=2, lr=[seed], **settings)},
        "extra_state": {"ema": weights(), "ema_fp32_params": weights(), "val_loss": seed} if ema else {"val_loss": seed},
        "optimizer_history": [{"num_updates": updates}],
        "last_optimizer_state": {"state": {}, "param_groups": []},
        "expert_parallel": {"size": 1, "index": 0, "save": None, "optimizer": [1]},
    }


@pytest.fixture
def save(tmp_path):
    """save(name, state) -> path"""

    def saved(name, state):
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    return saved


def exact_mean(states, name, part=lambda state: state["model"]):
    return torch.stack([part(state)[name].double() for state in states]).mean(0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_weights_and_gate_states_are_averaged_and_counters_are_of_the_newest(save, tmp_path, dtype, tolerance, capsys):
    states = [made_up(seed, dtype, updates) for seed, updates in ((1, 20), (2, 30), (3, 10))]
    paths = [save(f"{index}.pt", state) for index, state in enumerate(states)]
    figures = tmp_path / "figures.json"
    assert main(["average", *paths, str(tmp_path / "mean.pt"), "--json", str(figures)]) == 0
    state = read_checkpoint(str(tmp_path / "mean.pt"))
    assert list(state["model"]) == list(states[0]["model"])
    for name, value in state["model"].items():
        assert value.dtype == states[0]["model"][name].dtype
        if name not in (INTEGERS, UPDATES, TYPE_ONLY):
            torch.testing.assert_close(value.double(), exact_mean(states, name), rtol=tolerance, atol=1e-6)
    assert state["model"][INTEGERS] == state["model"][UPDATES] == 30
    assert state["cfg"]["model"].lr == [2] and state["extra_state"] == {"val_loss": 2}
    assert state["last_optimizer_state"] is None
    assert "optimizer state left out" in capsys.readouterr().out
    assert json.loads(figures.read_text())["source"] == [paths[2], paths[0], paths[1]]
    assert torch.equal(read_checkpoint(paths[0])["model"][BIAS], states[0]["model"][BIAS])  # the inputs are unchanged


def test_many_half_precision_weights_do_not_round_away_in_the_sum(save, tmp_path):
    states = [made_up(1, torch.float16) for _ in range(12)]
    for index, state in enumerate(states):
        state["model"]["encoder.embed_tokens.weight"].fill_(2048 + 2 * (index % 2))  # their float16 sum overflows
    paths = [save(f"{index}.pt", state) for index, state in enumerate(states)]
    main(["average", *paths, str(tmp_path / "mean.pt")])
    mean = read_checkpoint(str(tmp_path / "mean.pt"))["model"]["encoder.embed_tokens.weight"]
    assert mean.unique().tolist() in ([2048.0], [2050.0])  # 2049 rounded


def test_tied_weights_stay_tied(save, tmp_path):
    paths = [save(f"{seed}.pt", made_up(seed)) for seed in (1, 2)]
    main(["average", *paths, str(tmp_path / "mean.pt")])
    model = read_checkpoint(str(tmp_path / "mean.pt"))["model"]
    assert model["encoder.embed_tokens.weight"].data_ptr() == model["decoder.output_projection.weight"].data_ptr()


def test_the_average_of_sharded_checkpoints_is_the_sharded_average(save, tmp_path):
    for seed in (1, 2):
        save(f"{seed}.pt", made_up(seed))
        reshard(str(tmp_path / f"{seed}.pt"), str(tmp_path / f"two{seed}.pt"), 2)
    main(["average", *(str(tmp_path / f"{seed}.pt") for seed in (1, 2)), str(tmp_path / "whole.pt")])
    main(["average", *(str(tmp_path / f"two{seed}.pt") for seed in (1, 2)), str(tmp_path / "mean.pt")])
    assert (tmp_path / "mean-rank-1.pt").exists()
    reshard(str(tmp_path / "mean.pt"), str(tmp_path / "joined.pt"), 1)
    expected, found = (read_checkpoint(str(tmp_path / name))["model"] for name in ("whole.pt", "joined.pt"))
    assert all(torch.equal(expected[name], found[name]) for name in expected if name != TYPE_ONLY)
    sentence = "1.pt has 1 files and .*two2.pt 2; give them the same layout: fairseq-sparsemixer reshard"
    with pytest.raises(SystemExit, match=sentence):
        main(["average", str(tmp_path / "two2.pt"), str(tmp_path / "1.pt"), str(tmp_path / "no.pt")])


def test_the_ema_becomes_the_model(save, tmp_path):
    state = made_up(1, torch.float16, ema=True)
    missing = state["extra_state"]["ema"].pop(INTEGERS)  # fairseq leaves out nothing, but old files may
    state["extra_state"]["ema"][BIAS] = state["extra_state"]["ema"][BIAS].double()
    main(["average", "--ema", save("last.pt", state), str(tmp_path / "ema.pt")])
    found = read_checkpoint(str(tmp_path / "ema.pt"))
    assert found["extra_state"] == {"val_loss": 1} and found["model"][INTEGERS] == missing
    for name, value in state["extra_state"]["ema"].items():
        assert found["model"][name].dtype == state["model"][name].dtype
        assert name == TYPE_ONLY or torch.equal(found["model"][name], value.to(found["model"][name].dtype))


def changed(state, **model):
    return {**state, "model": {**state["model"], **model}}


@pytest.mark.parametrize(
    "other, flags, sentence",
    [
        (made_up(2, torch.float16), [], "b.pt has a different model than .*a.pt: .* is float16 .*, not float32"),
        (changed(made_up(2), more=torch.ones(1)), [], "more is float32 .1,., not missing; average checkpoints of one run"),
        (changed(made_up(2), **{BIAS: torch.ones(9)}), [], r"bias is float32 \(9,\), not float32 \(4,\)"),
        (made_up(2, router="switch"), [], "--router is 'switch', not 'topk'"),
        (changed(made_up(2), **{BIAS: torch.tensor([1.0, float("nan"), 0, 0])}), [], "b.pt has NaN or infinity in .*bias"),
        (made_up(2), ["--ema"], "has no EMA weights; train with --store-ema, or leave out --ema"),
    ],
)
def test_unsuitable_checkpoints_give_one_sentence_and_no_file(save, tmp_path, other, flags, sentence):
    paths = [save("a.pt", made_up(1, router="topk")), save("b.pt", other)]
    with pytest.raises(SystemExit, match=sentence) as error:
        main(["average", *flags, *paths, str(tmp_path / "mean.pt")])
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_an_existing_file_is_never_replaced(save, tmp_path):
    paths = [save(f"{seed}.pt", made_up(seed)) for seed in (1, 2)]
    with pytest.raises(SystemExit, match="2.pt exists already; the last path is the checkpoint to write"):
        main(["average", *paths])
    assert read_checkpoint(paths[1])["extra_state"] == {"val_loss": 2}


def test_an_ema_of_another_model_is_refused(save, tmp_path):
    state = made_up(1, ema=True)
    del state["extra_state"]["ema"][BIAS]
    with pytest.raises(SystemExit, match="has EMA weights of another model: .*bias is missing"):
        main(["average", "--ema", save("a.pt", state), str(tmp_path / "ema.pt")])
