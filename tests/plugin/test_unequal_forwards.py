"""unequal_forwards.py: settings that would deadlock ranks in a layer are refused before training."""

from types import SimpleNamespace

import pytest
from fairseq.sequence_generator import SequenceGenerator

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.unequal_forwards import (
    GENERATING_FLAGS,
    generating_together,
    refuse_unequal_forwards,
    refusing_generation,
)

REMEDY = "use --expert-parallel-size 1"


class Generator:
    def generate(self, models, sample):
        raise NotImplementedError


def refuse(task=None, model=(), **of_task):
    cfg = SimpleNamespace(model=SimpleNamespace(**dict(model)), task=SimpleNamespace(_name="my_task", **of_task))
    refuse_unequal_forwards(cfg, SimpleNamespace(**(task or {})), REMEDY)


def test_a_task_that_does_not_generate_is_accepted():
    refuse(dict(datasets={"train": [1]}, sequence_generators={}, generator=None), dict(encoder_layerdrop=0), eval_bleu=False)


@pytest.mark.parametrize("flag", ["encoder_layerdrop", "decoder_layerdrop"])
def test_layerdrop_is_refused(flag):
    with pytest.raises(ConfigurationError, match=f"--{flag.replace('_', '-')} 0.2 .*{REMEDY}"):
        refuse(model={flag: 0.2})


@pytest.mark.parametrize("flag", GENERATING_FLAGS)
def test_generation_in_validation_is_refused_with_its_flag(flag):
    with pytest.raises(ConfigurationError, match=f"--{flag.replace('_', '-')} generates .* fairseq-generate, or {REMEDY}"):
        refuse(**{flag: True})


@pytest.mark.parametrize("held", [Generator(), {"de": Generator()}, [Generator()]], ids=["one", "by language", "several"])
def test_a_task_with_a_generator_of_its_own_is_refused_with_its_name(held):
    with pytest.raises(ConfigurationError, match=f"--task my_task generates in training by a Generator, .*{REMEDY}"):
        refuse(dict(whatever=held))


def test_fairseqs_own_generator_is_accepted():
    refuse(dict(sequence_generators={"de": SequenceGenerator.__new__(SequenceGenerator)}), eval_bleu=True)


@pytest.mark.parametrize("ranks_wait", [True, False])
def test_the_generator_is_changed_only_in_steps_of_ranks_that_wait(ranks_wait):
    generate = SequenceGenerator._generate
    with pytest.raises(ZeroDivisionError), generating_together(ranks_wait):
        assert (SequenceGenerator._generate is generate) != ranks_wait
        raise ZeroDivisionError
    assert SequenceGenerator._generate is generate


def test_a_generator_created_during_a_step_is_refused_when_it_starts():
    generate = SequenceGenerator._generate
    generator = SequenceGenerator.__new__(SequenceGenerator)
    with pytest.raises(ConfigurationError, match=f"the task generates in training, twice; {REMEDY}"):
        with refusing_generation(f"twice; {REMEDY}"):
            generator._generate(sample=None)
    assert SequenceGenerator._generate is generate
