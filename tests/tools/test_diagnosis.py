"""The checks of `doctor`: each failure has a state and a remedy."""

from importlib.machinery import ModuleSpec

import pytest
import torch

from fairseq_sparsemixer.tools import diagnosis


@pytest.fixture
def fairseqs(monkeypatch):
    """fairseqs(name, ...): pretend that only these distributions provide fairseq; without names, it is not installed."""

    def pretend(*names, there=True):
        monkeypatch.setattr(diagnosis, "providers", lambda package: list(names))
        monkeypatch.setattr(
            diagnosis, "find_spec", lambda package: ModuleSpec(package, None, origin="/src/fairseq") if there else None
        )

    return pretend


def test_without_fairseq_only_layers_can_be_used(fairseqs):
    fairseqs(there=False)
    finding = diagnosis.check_fairseq()
    assert finding.state == diagnosis.LIMITED and finding.remedy == 'pip install "fairseq-sparsemixer[fairseq]"'


def test_two_installed_fairseqs_are_broken_under_any_names(fairseqs):
    fairseqs("fairseq 0.12.2", "ve-fairseq 0.12.3")
    finding = diagnosis.check_fairseq()
    assert finding.state == diagnosis.BROKEN and finding.found == "fairseq 0.12.2 and ve-fairseq 0.12.3"
    assert "pip uninstall fairseq ve-fairseq, then pip install" in finding.remedy


@pytest.mark.parametrize("name", ["fairseq 0.12.2", "ve-fairseq 0.12.3", "somebodys-fairseq 7"])
def test_the_distribution_of_a_working_fairseq_is_named(fairseqs, name):
    fairseqs(name)
    assert diagnosis.check_fairseq() == diagnosis.Finding("fairseq", diagnosis.OK, name)


def test_a_fairseq_without_distribution_is_named_by_its_folder(fairseqs):
    fairseqs()
    assert diagnosis.check_fairseq().found == "in /src/fairseq, not from an installed distribution"


def test_a_fairseq_that_does_not_import_is_broken(fairseqs, monkeypatch):
    fairseqs("fairseq 0.12.2")

    def stumble(name):
        raise ValueError("mutable default")

    monkeypatch.setattr(diagnosis, "import_module", stumble)
    assert diagnosis.check_fairseq().found == "fairseq 0.12.2 does not import (ValueError)"
    assert diagnosis.check_models().state == diagnosis.LIMITED


def test_models_are_trained_and_run():
    finding = diagnosis.check_models()
    assert finding.state == diagnosis.OK and finding.found.endswith("transformer_moe trains and runs")


def test_models_that_do_not_run_are_broken(monkeypatch):
    from fairseq_sparsemixer.plugin.models.moe_block import MoEEncoderLayer

    def stumble(self, *args, **kwargs):
        raise AttributeError("no attribute 'weight'\nsee above")

    monkeypatch.setattr(MoEEncoderLayer, "forward", stumble)
    finding = diagnosis.check_models()
    assert finding.state == diagnosis.BROKEN and "docs/support.md" in finding.remedy
    assert finding.found == "transformer_moe with --router sparsemixer does not run (AttributeError: no attribute 'weight')"


def test_models_with_non_finite_output_are_broken(monkeypatch):
    from fairseq_sparsemixer.moe.layer import MoELayer

    monkeypatch.setattr(MoELayer, "forward", lambda self, x, *args, **kwargs: x * float("nan"))
    assert "its output is not finite" in diagnosis.check_models().found


def test_an_old_torch_is_broken(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.3.1+cpu")
    assert diagnosis.check_torch().state == diagnosis.BROKEN


@pytest.mark.parametrize("name, state", [("fairscale", diagnosis.BROKEN), ("matplotlib", diagnosis.LIMITED)])
def test_a_missing_package_is_reported_with_the_remedy(monkeypatch, name, state):
    monkeypatch.setattr(diagnosis, "version", lambda name: None)
    finding = diagnosis.check_package(name, diagnosis.PACKAGES[name])
    assert finding.state == state and "pip install" in finding.remedy


def test_a_device_on_which_no_layer_trains_is_broken():
    def build(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor this device")

    finding = diagnosis.check_device("cuda:0", build)
    assert finding.state == diagnosis.BROKEN
    assert finding.found == "a layer does not train (no kernel image is available)" and "--cpu" in finding.remedy


def test_a_solver_that_does_not_load_counts_as_missing(monkeypatch):
    def load(name):
        if name == "fairseq.libbase":
            raise ImportError("undefined symbol: _ZNK3c106SymInt6sym_neERKS0_")

    monkeypatch.setattr(diagnosis, "import_module", load)
    assert diagnosis.check_balanced_assignment().found == "assigns with scipy.optimize"
