"""An optimizer's loaded state is compared with its parameters; what each optimizer of fairseq keeps is accepted."""

from argparse import Namespace

import pytest
import torch
from fairseq import optim
from fairseq.optim.fp16_optimizer import FP16Optimizer
from omegaconf import OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.moments import refuse_misfits

SETTINGS = {
    "adam": dict(adam_betas="(0.9, 0.999)", adam_eps=1e-8, use_old_adam=True, fp16_adam_stats=False, tpu=False),
    "adafactor": dict(
        adafactor_eps="(1e-30, 1e-3)", clip_threshold=1.0, decay_rate=-0.8, beta1=0.9, scale_parameter=False, relative_step=False,
        warmup_init=False,
    ),
    "adagrad": {},
    "adadelta": dict(adadelta_rho=0.9, adadelta_eps=1e-6, anneal_eps=False),
    "adamax": dict(adamax_betas="(0.9, 0.999)", adamax_eps=1e-8, no_bias_correction=False),
    "nag": dict(momentum=0.9),
    "sgd": dict(momentum=0.9),
}  # fmt: skip


def stepped(name, parameters):
    """A fairseq optimizer after one step, for which the last parameter had no gradient."""
    values = {"_name": name, "lr": [0.1], "weight_decay": 0.0, **SETTINGS[name]}
    legacy = name in ("adafactor", "adadelta", "adamax", "sgd", "adagrad")
    optimizer = optim.build_optimizer(Namespace(optimizer=name, **values) if legacy else OmegaConf.create(values), parameters)
    for parameter in parameters[:-1]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def parameters():
    return [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4,), (2, 5, 3), (7,))]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_an_optimizer_of_fairseq_keeps_is_accepted(name):
    optimizer = stepped(name, parameters())
    assert len(optimizer.optimizer.state) == (4 if name == "adagrad" else 3)  # torch's makes its sums at once
    refuse_misfits("m.pt", optimizer, [])


@pytest.mark.parametrize("name", SETTINGS)
def test_each_of_its_tensors_must_have_the_right_shape(name):
    optimizer = stepped(name, parameters())
    tensors = [
        (entry, key)
        for entry in optimizer.optimizer.state.values()
        for key, value in entry.items()
        if torch.is_tensor(value) and value.dim()
    ]
    assert len(tensors) >= 3
    for entry, key in tensors:
        value = entry[key]
        entry[key] = value[:1]
        with pytest.raises(ConfigurationError, match=rf"number \d: {key} is "):
            refuse_misfits("m.pt", optimizer, [])
        entry[key] = value


def test_a_float32_copy_of_a_parameter_is_named_by_its_place():
    copies, own = parameters(), parameters()
    optimizer = stepped("adam", copies)
    optimizer.optimizer.state[copies[1]]["exp_avg"] = torch.ones(9)
    with pytest.raises(ConfigurationError, match=r"the optimizer state in m.pt does not fit parameter b: exp_avg is \(9,\), not"):
        refuse_misfits("m.pt", optimizer, list(zip("abcd", own)))
    with pytest.raises(ConfigurationError, match="parameter b"):
        refuse_misfits("m.pt", optimizer, list(zip("dcba", reversed(copies))))


@pytest.mark.parametrize("half", [False, True])
def test_each_optimizer_of_a_composite_one_is_compared_also_in_half_precision(half):
    adam = {"_name": "adam", "lr": [0.1], "weight_decay": 0.0, **SETTINGS["adam"]}
    group = {"optimizer": adam, "lr_scheduler": {"_name": "fixed", "force_anneal": None, "lr_shrink": 0.1, "warmup_updates": 0}}
    common = dict(fp16_init_scale=4, fp16_scale_window=None, fp16_scale_tolerance=0.0, threshold_loss_scale=None)
    common = dict(common, min_loss_scale=1e-4, bf16=False, tpu=False, fp16_no_flatten_grads=True, model_parallel_size=1)
    cfg = OmegaConf.create(
        {
            "optimizer": {"_name": "composite", "groups": {"a": group, "default": group}, "dynamic_groups": False},
            "common": {**common, "on_cpu_convert_precision": False},
            "optimization": {"update_freq": [1]},
            "distributed_training": {"distributed_world_size": 1},
        }
    )
    trained = parameters()
    trained[0].param_group = "a"
    optimizer = FP16Optimizer.build_optimizer(cfg, trained) if half else optim.build_optimizer(cfg.optimizer, trained)
    optimizer.backward(sum(parameter.sum() for parameter in trained))
    optimizer.step()
    refuse_misfits("m.pt", optimizer, [])
    last = list(optimizer.optimizer.optimizers["default"].optimizer.state.values())[-1]
    last["exp_avg"] = torch.ones(9)
    with pytest.raises(ConfigurationError, match=r"number 2: exp_avg is \(9,\), not \(7,\)"):
        refuse_misfits("m.pt", optimizer, [])
