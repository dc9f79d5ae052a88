"""The error that ends a command."""

import pickle

import pytest

from fairseq_sparsemixer.errors import ConfigurationError


def test_it_ends_a_program_with_status_one_and_a_one_line_message():
    with pytest.raises(SystemExit) as caught:
        raise ConfigurationError("--num-experts 0 must be at least 1")
    assert caught.value.code == "fairseq-sparsemixer: --num-experts 0 must be at least 1"  # a string is printed, with status 1


def test_a_library_caller_can_catch_it_as_a_value_error():
    with pytest.raises(ValueError, match="must be at least 1"):
        raise ConfigurationError("--num-experts 0 must be at least 1")


def test_it_can_be_pickled_to_another_process():
    error = ConfigurationError("--num-experts 0 must be at least 1")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.message) == (error.code, error.message)
