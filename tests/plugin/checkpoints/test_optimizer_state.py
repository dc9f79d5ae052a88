"""Mapping an optimizer's state from the parameters of one model to those made from them."""

import pytest
import torch

from fairseq_sparsemixer.plugin.checkpoints.optimizer_state import Unmapped, map_optimizer_state

SHAPES = {"a": torch.Size([2]), "b0": torch.Size([2, 3]), "unused": torch.Size([4]), "b1": torch.Size([2, 3])}
MAPPING = {"b": ["b0", "b1"], "a": ["a"]}


def join(tensors, name):
    return torch.stack(tensors) if name == "b" else tensors[0]


def state(*left_out, **changes):
    entries = {i: {"step": 5, "moment": torch.full(shape, float(i))} for i, shape in enumerate(SHAPES.values())}
    for index, entry in changes.items():
        entries[int(index[1:])].update(entry)
    kept = {index: entry for index, entry in entries.items() if index not in left_out}
    return {"state": kept, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]}


def test_entries_follow_their_parameters_and_are_joined_like_them():
    found = map_optimizer_state(state(2), SHAPES, MAPPING, join)
    assert found["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert [entry["step"] for entry in found["state"].values()] == [5, 5]
    assert found["state"][0]["moment"].flatten(1).tolist() == [[1.0] * 6, [3.0] * 6]
    assert found["state"][1]["moment"].tolist() == [0, 0]


def test_a_flat_entry_is_split_by_parameter():
    moment = torch.arange(18.0)
    flat = {"state": {0: {"step": 5, "moment": moment}}, "param_groups": [{"params": [0]}], "loss_scale": 2.0}
    found = map_optimizer_state(flat, SHAPES, MAPPING, join)
    assert found["state"][1]["moment"].tolist() == [0, 1] and found["loss_scale"] == 2.0
    assert torch.equal(found["state"][0]["moment"], torch.stack([moment[2:8].view(2, 3), moment[12:].view(2, 3)]))


def test_a_parameter_that_never_had_a_gradient_has_no_state():
    assert set(map_optimizer_state(state(1, 3), SHAPES, MAPPING, join)["state"]) == {1}


@pytest.mark.parametrize("optimizer, reason", [
    (state(1), "some of the parameters that became b were never updated"),
    (state(_3={"step": 4}), "the parameters that became b differ in step: some of them had no gradient in some updates"),
    (state(_1={"moment": torch.ones(2)}), "this optimizer does not keep one number for each weight"),
    ({"state": {}, "param_groups": [{"params": [0, 1]}]}, "it is for 2 parameters, but the model has 4"),
    ({"state": {}, "param_groups": [{}, {}]}, "it has 2 groups of parameters"),
    ({"state": {0: {"moment": torch.ones(17)}}, "param_groups": [{"params": [0]}]}, "it is not for the 18 numbers that"),
])  # fmt: skip
def test_a_state_that_cannot_be_mapped_is_refused_with_the_reason(optimizer, reason):
    with pytest.raises(Unmapped, match=reason):
        map_optimizer_state(optimizer, SHAPES, MAPPING, join)
