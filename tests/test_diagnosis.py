"""The doctor's checks: each failure has its state and its remedy."""

import pytest
import torch

from fairseq_sparsemixer import diagnosis


@pytest.fixture
def installed(monkeypatch):
    """installed(name=version, ...): pretend that these distributions, and no others, are there."""

    def pretend(**versions):
        monkeypatch.setattr(diagnosis, "version", lambda name: versions.get(name.replace("-", "_")))

    return pretend


def test_no_fairseq_limits_to_layers(installed):
    installed()
    finding = diagnosis.check_fairseq()
    assert finding.state == diagnosis.LIMITED and finding.remedy.startswith("pip install fairseq")


def test_two_fairseqs_are_broken(installed):
    installed(fairseq="0.12.2", fairseq_fixed="0.12.3.1")
    finding = diagnosis.check_fairseq()
    assert finding.state == diagnosis.BROKEN and "pip uninstall fairseq fairseq-fixed" in finding.remedy


def test_a_fairseq_that_does_not_import_is_broken(installed, monkeypatch):
    installed(fairseq="0.12.2")

    def stumble(name):
        raise ValueError("mutable default")

    monkeypatch.setattr(diagnosis, "import_module", stumble)
    assert diagnosis.check_fairseq().found == "fairseq 0.12.2 does not import (ValueError)"
    assert diagnosis.check_registration().state == diagnosis.LIMITED


def test_an_old_torch_is_broken(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.3.1+cpu")
    assert diagnosis.check_torch().state == diagnosis.BROKEN


@pytest.mark.parametrize("name, state", [("fairscale", diagnosis.BROKEN), ("matplotlib", diagnosis.LIMITED)])
def test_a_missing_package_says_what_to_do(installed, name, state):
    installed()
    finding = diagnosis.check_package(name, diagnosis.PACKAGES[name])
    assert finding.state == state and "pip install" in finding.remedy


def test_a_device_on_which_no_layer_trains_is_broken():
    def build(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor this device")

    finding = diagnosis.check_device("cuda:0", build)
    assert finding.state == diagnosis.BROKEN
    assert finding.found == "a layer does not train (no kernel image is available)" and "--cpu" in finding.remedy
