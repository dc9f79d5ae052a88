"""Averaged and reloaded weights: exponential moving averages, means of checkpoints, models loaded in Python."""

import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from decoding import check_scores, decode, log_probabilities
from fitting import EXPERTS, TRANSLATION, fit, weights
from ranks import rank_number, run_ranks
from runs import initialised

from fairseq_sparsemixer.plugin.checkpoints.averaging import average

pytestmark = pytest.mark.slow

USER_DIR = Path(__file__).resolve().parents[2] / "fairseq_sparsemixer"
FLAGS = [*TRANSLATION, *EXPERTS, "--batch-size", 8, "--disable-validation", "--no-epoch-checkpoints"]
DECAY = 0.75
AVERAGED = {
    "every update": [],
    "from the third update on": ["--ema-start-update", 3],
    "every second update": ["--ema-update-freq", 2],
    "in float32": ["--ema-fp32"],
    "with a bias": ["--moe-bias-update-rate", 0.01, "--moe-balance-loss-weight", 0],
}


def moving_average(models, start: int = 0, every: int = 1):
    """The recurrence a <- d a + (1 - d) w over the models after each update, in float64.

    It starts from the model after the first update, because fairseq makes its copy when it is first needed.
    """
    average = {name: value.double() for name, value in models[1].state_dict().items()}
    for update, model in enumerate(models[1:], 1):
        if update % every:
            continue
        decay = 0 if update < start else DECAY
        for name, value in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    return average


def check_average(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in initialised(expected).items():
        if not name.endswith("version"):
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-7, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", AVERAGED)
def test_the_moving_average_follows_the_recurrence_for_all_weights(case, pairs, tmp_path):
    from fairseq.checkpoint_utils import load_ema_from_checkpoint

    flags = dict(zip(AVERAGED[case][::2], AVERAGED[case][1::2]))
    run = fit(pairs, tmp_path, *FLAGS, "--store-ema", "--ema-decay", DECAY, *AVERAGED[case], updates=6)
    expected = moving_average(run.models, flags.get("--ema-start-update", 0), flags.get("--ema-update-freq", 1))
    assert sum(".experts." in name for name in expected) > 0
    check_average(run.trainer.ema.get_model().state_dict(), expected)
    check_average(load_ema_from_checkpoint(str(tmp_path / "checkpoint_last.pt"))["model"], expected)
    average([str(tmp_path / "checkpoint_last.pt")], str(tmp_path / "ema.pt"), ema=True)
    check_average(torch.load(tmp_path / "ema.pt", weights_only=False)["model"], expected)


def test_the_moving_average_continues_after_a_restart(pairs, tmp_path):
    flags = [*FLAGS, "--store-ema", "--ema-decay", DECAY]
    first = fit(pairs, tmp_path, *flags, updates=3)
    second = fit(pairs, tmp_path, *flags, updates=6)
    check_average(second.trainer.ema.get_model().state_dict(), moving_average(first.models + second.models[1:]))


def test_an_averaged_checkpoint_translates_like_the_mean_of_the_weights(pairs, tmp_path):
    from recipes.common.averaging import last_checkpoints

    run = fit(pairs, tmp_path, *FLAGS, "--save-interval-updates", 2, updates=8)
    paths = last_checkpoints(tmp_path, 3)
    average([str(path) for path in paths], str(tmp_path / "mean.pt"))
    model = copy.deepcopy(run.models[-1])
    states = [run.models[update].state_dict() for update in (2, 4, 8)]  # none of these is at the end of an epoch
    expected = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
    found = weights(tmp_path / "mean.pt")
    assert found.keys() == initialised(expected).keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-8)
    model.load_state_dict(expected)
    check_scores(decode(pairs, tmp_path / "mean.pt", tmp_path, "--beam", 2), partial(log_probabilities, model))


@pytest.fixture(scope="module")
def printed(pairs, path_of, tmp_path_factory):
    """The hypotheses of fairseq-generate."""
    return decode(pairs, path_of("sparsemixer"), tmp_path_factory.mktemp("printed"), "--beam", 5)


def test_a_model_loaded_in_python_equals_the_trained_model(pairs, trained, path_of, printed):
    from fairseq import checkpoint_utils

    from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEModel

    path = path_of("sparsemixer")
    (loaded,), _ = checkpoint_utils.load_model_ensemble([str(path)])
    expected = trained["sparsemixer"].models[-1].state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in initialised(loaded.state_dict()).items())
    hub = TransformerMoEModel.from_pretrained(str(path.parent), path.name, str(pairs))
    words = hub.src_dict
    sentences = [words.string(one.source) for one in printed]
    assert hub.translate(sentences, beam=5, max_len_a=0, max_len_b=8) == [one.text for one in printed]


WITHOUT_IMPORT = """
import json, sys
from fairseq.models.transformer import TransformerModel
user_dir, folder, name, data, *sentences = sys.argv[1:]
hub = TransformerModel.from_pretrained(folder, name, data, user_dir=user_dir)
print(json.dumps([type(hub.models[0]).__name__, hub.translate(sentences, beam=5, max_len_a=0, max_len_b=8)]))
"""


def test_a_script_without_our_import_can_load_a_model_with_user_dir(pairs, path_of, printed):
    path = path_of("sparsemixer")
    sentences = [" ".join(f"w{index - 4}" for index in one.source[:-1].tolist()) for one in printed]
    script = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, str(USER_DIR), str(path.parent), path.name, str(pairs), *sentences],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert script.returncode == 0, script.stderr
    assert json.loads(script.stdout.splitlines()[-1]) == ["TransformerMoEModel", [one.text for one in printed]]


def average_on_a_rank(data: Path, save_dir: Path, meeting: Path, scope: str):
    """(weights before training and after each update, moving average) of this rank."""
    from fairseq_sparsemixer.plugin.trainer import MoETrainer

    launch = (
        f"--distributed-world-size 2 --distributed-init-method file://{meeting} --distributed-rank {rank_number()}"
        " --device-id 0 --distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
    ).split()
    states = []
    step = MoETrainer.train_step

    def kept(self, *args, **kwargs):
        if not states:
            states.append(state_of(self.get_model()))
        output = step(self, *args, **kwargs)
        states.append(state_of(self.get_model()))
        return output

    MoETrainer.train_step = kept  # never restored: the process ends after this run
    flags = ["--store-ema", "--ema-decay", DECAY, "--balance-scope", scope]
    trainer = fit(data, save_dir, *FLAGS, *launch, *flags, updates=4).trainer
    return states, state_of(trainer.ema.get_model())


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("scope", ["local", "global"])
def test_each_rank_averages_its_own_experts(scope, pairs, tmp_path):
    from types import SimpleNamespace

    for states, found in run_ranks(2, average_on_a_rank, pairs, tmp_path / "run", tmp_path / "meeting", scope, group=False):
        check_average(found, moving_average([SimpleNamespace(state_dict=lambda state=state: state) for state in states]))
