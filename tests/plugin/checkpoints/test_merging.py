"""merging.py and `convert --merge-lora`: adapters of experts become part of their weights."""

import json
from argparse import Namespace

import pytest
import runs
import torch

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.expert_count import Change, change_experts
from fairseq_sparsemixer.plugin.checkpoints.resharding import reshard
from fairseq_sparsemixer.options import MoEOptions

LAYER = "encoder.layers.0.fc1.moe"
E, M, H, R = 4, 3, 5, 2


def made_up(dtype=torch.float32, alpha=None, rank=R, namespace=False, **more):
    generator = torch.Generator().manual_seed(1)
    experts = Experts(E, M, H)
    if rank:
        experts.add_adapters(rank, alpha)

    def weights():
        random = {name: torch.randn(value.shape, generator=generator) for name, value in experts.named_parameters()}
        named = {f"{LAYER}.experts.{name}": value.to(dtype) for name, value in random.items()}
        return {"encoder.embed_tokens.weight": torch.ones(2, M), **named}

    settings = {"_name": "transformer_moe", "router": "switch", "expert_lora_rank": rank, "expert_lora_alpha": alpha}
    model = Namespace(**settings) if namespace else settings
    return {
        "args": None,
        "cfg": {"model": model, "task": {"data": "here"}},
        "model": weights(),
        "extra_state": {"ema": weights(), "epoch": 3},
        "last_optimizer_state": {"state": {}, "param_groups": []},
        "expert_parallel": {"size": 1, "index": 0, "save": None, "optimizer": [0, 1]},
        **more,
    }


def expected(weights, part, scale):
    """W + s A B of each expert in float64."""
    own = {name: value.double() for name, value in weights.items()}
    names = [f"{LAYER}.experts.{name}" for name in (f"weight_{part}", f"lora_{part}_a", f"lora_{part}_b")]
    return torch.stack([own[names[0]][e] + scale * own[names[1]][e] @ own[names[2]][e] for e in range(E)])


@pytest.mark.parametrize("dtype, alpha, scale", [(torch.float32, None, 1), (torch.float32, 3, 1.5), (torch.float16, 3, 1.5)])
@pytest.mark.parametrize("namespace", [False, True])
def test_the_weights_are_those_of_the_formula(dtype, alpha, scale, namespace, tmp_path, capsys):
    state = made_up(dtype, alpha, namespace=namespace)
    torch.save(state, tmp_path / "lora.pt")
    main(["convert", "--merge-lora", str(tmp_path / "lora.pt"), str(tmp_path / "out.pt"), "--json", str(tmp_path / "out.json")])
    assert "2 weights of experts with their adapters merged" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text()) == {"merged": 2}
    merged = read_checkpoint(str(tmp_path / "out.pt"))
    for found, source in ((merged["model"], state["model"]), (merged["extra_state"]["ema"], state["extra_state"]["ema"])):
        assert list(found) == [name for name in source if ".lora_" not in name]
        for part in ("in", "out"):
            weight = found[f"{LAYER}.experts.weight_{part}"]
            assert weight.dtype == dtype
            close = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(weight.double(), expected(source, part, scale), **close)
            assert torch.equal(found[f"{LAYER}.experts.bias_{part}"], source[f"{LAYER}.experts.bias_{part}"])
    settings = merged["cfg"]["model"]
    settings = vars(settings) if namespace else settings
    assert settings["expert_lora_rank"] is None and settings["expert_lora_alpha"] is None and settings["router"] == "switch"
    assert merged["last_optimizer_state"] is None and merged["extra_state"]["epoch"] == 3
    assert merged["cfg"]["task"] == {"data": "here"} and state["model"].keys() > merged["model"].keys()


def test_sharded_files_are_merged_one_by_one(tmp_path):
    torch.save(made_up(), tmp_path / "lora.pt")
    reshard(str(tmp_path / "lora.pt"), str(tmp_path / "two.pt"), 2)
    main(["convert", "--merge-lora", str(tmp_path / "two.pt"), str(tmp_path / "merged.pt")])
    reshard(str(tmp_path / "merged.pt"), str(tmp_path / "whole.pt"), 1)
    main(["convert", "--merge-lora", str(tmp_path / "lora.pt"), str(tmp_path / "alone.pt")])
    whole, alone = (read_checkpoint(str(tmp_path / name))["model"] for name in ("whole.pt", "alone.pt"))
    assert whole.keys() == alone.keys() and all(torch.equal(value, alone[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    "rank, words, sentence",
    [
        (0, [], "has no adapters of experts to merge"),
        (R, ["--dict", "dict.txt"], "--dict dict.txt is not for --merge-lora"),
        (R, ["--data", "bin"], "--data bin is not for --merge-lora"),
    ],
)
def test_what_cannot_be_merged_is_refused(rank, words, sentence, tmp_path):
    torch.save(made_up(rank=rank), tmp_path / "lora.pt")
    with pytest.raises(SystemExit, match=sentence):
        main(["convert", "--merge-lora", str(tmp_path / "lora.pt"), str(tmp_path / "out.pt"), *words])


def test_another_number_of_experts_asks_for_merged_ones():
    with pytest.raises(ConfigurationError, match="merge them first"):
        change_experts(made_up(), MoEOptions(num_experts=8), Change())


@pytest.mark.slow
def test_adapters_are_trained_from_a_plain_checkpoint_and_merged_to_the_same_function(corpus, tmp_path):
    runs.train(corpus, tmp_path / "plain", updates=2)
    plain, lora = tmp_path / "plain" / "checkpoint_last.pt", tmp_path / "lora" / "checkpoint_last.pt"
    flags = ["--expert-lora-rank", "2", "--expert-lora-alpha", "4", "--freeze", "^(?!.*lora_)"]
    start = ["--finetune-from-model", plain]
    whole = runs.train(corpus, tmp_path / "whole", *flags, *start, updates=4)
    assert runs.train(corpus, tmp_path / "lora", *flags, *start, updates=2) == whole[:2]
    assert runs.train(corpus, tmp_path / "lora", *flags, updates=4) == whole[2:]
    anew = ["--restore-file", plain, "--reset-optimizer", "--reset-lr-scheduler", "--reset-meters", "--reset-dataloader"]
    assert runs.train(corpus, tmp_path / "restored", *flags, *anew, updates=1) == whole[:1]
    before, after = (read_checkpoint(str(path)) for path in (plain, lora))
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items() if "_float_tensor" not in name)
    assert len(after["last_optimizer_state"]["state"]) == sum(".lora_" in name for name in after["model"]) == 12
    main(["convert", "--merge-lora", str(lora), str(tmp_path / "merged.pt")])
    assert read_checkpoint(str(tmp_path / "merged.pt"))["model"].keys() == before["model"].keys()
    lines = [
        [line.split("\t") for line in runs.generate(corpus, path, tmp_path / name)]
        for name, path in (("a", lora), ("b", tmp_path / "merged.pt"))
    ]
    assert [line[2] for line in lines[0]] == [line[2] for line in lines[1]]
    torch.testing.assert_close(*[torch.tensor([float(line[1]) for line in one]) for one in lines], rtol=1e-5, atol=1e-5)
    for other, sentence in (
        ([*flags, "--restore-file", plain], "was trained without --expert-lora-rank, so its optimizer state"),
        (["--finetune-from-model", lora], "has adapters of rank 2, but this run has no --expert-lora-rank"),
        (["--expert-lora-rank", "3", "--finetune-from-model", lora], "rank 2, but this run has --expert-lora-rank 3"),
        ([*flags[:2], "--finetune-from-model", lora], "adapters for --expert-lora-alpha 4, but this run has 2; give"),
        ([*flags[:2], "--expert-lora-alpha", "1", "--restore-file", lora, *anew[2:]], "alpha 4, but this run has 1; give"),
        (["--expert-lora-alpha", "3"], "--expert-lora-alpha 3.0 scales adapters, which need --expert-lora-rank"),
        (["--expert-lora-rank", "0"], "--expert-lora-rank 0 must be at least 1"),
        (["--checkpoint-experts", "--checkpoint-activations"], "--checkpoint-experts does nothing under --checkpoint-act"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            runs.train(corpus, tmp_path / "other", *other, updates=1)
