"""`moe_cross_entropy`: fairseq's cross_entropy with the flags of the auxiliary losses."""

from dataclasses import fields

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig, AuxiliaryLosses


def test_it_is_registered_with_fairseqs_flags_and_ours():
    criterion = CRITERION_REGISTRY["moe_cross_entropy"]
    assert issubclass(criterion, AuxiliaryLosses) and issubclass(criterion, CrossEntropyCriterion)
    flags = {field.name for field in fields(CRITERION_DATACLASS_REGISTRY["moe_cross_entropy"])}
    assert flags == {field.name for config in (AuxiliaryLossConfig, CrossEntropyCriterionConfig) for field in fields(config)}


def test_each_of_our_flags_has_a_help_text():
    assert all(field.metadata.get("help") for field in fields(AuxiliaryLossConfig) if not field.name.startswith("_"))
