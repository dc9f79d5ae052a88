"""The output of fairseq-generate and fairseq-interactive for models with experts, compared with explicit probabilities."""

import copy
import math
from functools import partial

import pytest
import torch
from decoding import EOS, bits_per_token, check_scores, decode, interact, log_probabilities

pytestmark = pytest.mark.slow

CONSTRAINTS = {"w1 w2 w3": ["w7", "w9"], "w4 w4": ["w11"], "w5 w0 w8 w2": ["w3", "w3", "w19"]}


@pytest.mark.parametrize("name", ["sparsemixer", "switch", "dense"])
def test_a_score_is_the_log_probability_in_any_batch(name, pairs, trained, path_of, tmp_path):
    found = decode(pairs, path_of(name), tmp_path, "--beam", 3)
    assert len({len(hypothesis.source) for hypothesis in found}) > 1, "without different lengths, nothing is padded"
    check_scores(found, partial(log_probabilities, trained[name].models[-1]))


def test_an_ensemble_of_experts_and_dense_averages_probabilities(pairs, trained, path_of, tmp_path):
    names = ("sparsemixer", "dense", "switch")

    def mean(source, tokens):
        members = [log_probabilities(trained[name].models[-1], source, tokens) for name in names]
        return torch.stack([member.exp() for member in members]).mean(0).log()

    found = decode(pairs, ":".join(str(path_of(name)) for name in names), tmp_path, "--beam", 3)
    check_scores(found, mean)
    one = found[0]
    alone = bits_per_token(log_probabilities(trained["sparsemixer"].models[-1], one.source, one.tokens), one.tokens)
    assert abs(alone - one.score) > 1e-3, "the ensemble's members do not differ"


def test_fusion_adds_the_weighted_log_probabilities_of_the_language_model(pairs, trained, path_of, tmp_path):
    weight = 0.3

    def fused(source, tokens):
        translation = log_probabilities(trained["sparsemixer"].models[-1], source, tokens)
        return translation + weight * log_probabilities(trained["target"].models[-1], None, tokens)

    flags = ("--beam", 3, "--lm-path", path_of("target"), "--lm-weight", weight)
    check_scores(decode(pairs, path_of("sparsemixer"), tmp_path, *flags), fused)


def test_a_prefix_is_kept_and_scored(pairs, trained, path_of, tmp_path):
    free = decode(pairs, path_of("sparsemixer"), tmp_path, "--beam", 2)
    found = decode(pairs, path_of("sparsemixer"), tmp_path, "--beam", 2, "--prefix-size", 2)
    dataset = load_translation_task(trained).dataset("valid")
    references = [dataset[index]["target"] for index in range(len(dataset))]
    assert [one.tokens[:2].tolist() for one in found] == [reference[:2].tolist() for reference in references]
    assert any(not torch.equal(one.tokens[:2], other.tokens[:2]) for one, other in zip(found, free))
    check_scores(found, partial(log_probabilities, trained["sparsemixer"].models[-1]))


def load_translation_task(trained):
    task = trained["sparsemixer"].trainer.task
    task.load_dataset("valid")
    return task


@pytest.mark.parametrize("order", ["ordered", "unordered"])
def test_constraints_are_in_the_hypothesis(order, pairs, trained, path_of, tmp_path):
    (tmp_path / "input").write_text("".join("\t".join([text, *words]) + "\n" for text, words in CONSTRAINTS.items()))
    found = interact(pairs, path_of("sparsemixer"), tmp_path / "input", "--beam", 5, "--constraints", order)
    for hypothesis, words in zip(found, CONSTRAINTS.values()):
        placed = iter(hypothesis.text.split())
        if order == "ordered":
            assert all(word in placed for word in words), "each after the previous one"
        else:
            placed = list(placed)
            assert all(placed.count(word) >= words.count(word) for word in words)
    assert len(found) == len(CONSTRAINTS)
    check_scores(found, partial(log_probabilities, trained["sparsemixer"].models[-1]))


def test_samples_are_drawn_from_the_model_and_reproducible_by_seed(pairs, trained, path_of, tmp_path):
    draw = partial(decode, pairs, path_of("sparsemixer"), tmp_path, "--beam", 1, "--sampling", "--sampling-topk", 3, "--seed")
    first, again, other = draw(1), draw(1), draw(2)
    assert [one.text for one in first] == [one.text for one in again] != [one.text for one in other]
    chances = partial(log_probabilities, trained["sparsemixer"].models[-1])
    check_scores(first, chances)
    for one in first:
        steps = chances(one.source, one.tokens)
        steps[0, EOS] = -math.inf  # hypotheses are never empty
        drawn = zip(one.tokens[:-1], steps.topk(3).indices)  # the last token may be </s> because of --max-len-b
        assert all(token in candidates for token, candidates in drawn)


def test_an_alignment_is_the_strongest_attention_of_each_word(pairs, trained, path_of, tmp_path):
    model = trained["sparsemixer"].models[-1].eval()
    found = decode(pairs, path_of("sparsemixer"), tmp_path, "--beam", 2, "--print-alignment", "hard")
    assert any(one.alignment for one in found)
    for one in found:
        given = torch.cat([one.tokens.new_tensor([EOS]), one.tokens[:-1]])
        with torch.no_grad():
            extra = model(one.source.unsqueeze(0), torch.tensor([len(one.source)]), given.unsqueeze(0))[1]
        attention = extra["attn"][0][0]  # [target, source], the mean over heads
        expected = attention[:-1, :-1].argmax(-1)  # </s> is not aligned
        assert one.alignment == " ".join(f"{source}-{target}" for target, source in enumerate(expected.tolist()))


def test_retained_dropout_depends_on_the_seed_and_is_off_by_default(pairs, path_of, tmp_path):
    override = ("--model-overrides", "{'activation_dropout': 0.5}")  # only in the experts
    translate = partial(decode, pairs, path_of("switch"), tmp_path, "--beam", 1, *override)

    def scores(*flags):
        return [one.score for one in translate(*flags)]

    assert scores("--seed", 1) == scores("--seed", 2)
    first = scores("--retain-dropout", "--seed", 1)
    assert first == scores("--retain-dropout", "--seed", 1)
    assert all(abs(one - other) > 1e-3 for one, other in zip(first, scores("--retain-dropout", "--seed", 2)))


def test_a_model_pruned_at_inference_equals_one_without_those_layers(pairs, trained, path_of, tmp_path):
    pruned = copy.deepcopy(trained["sparsemixer"].models[-1])
    del pruned.encoder.layers[0], pruned.decoder.layers[1]
    kept = "{'encoder_layers_to_keep': '1', 'decoder_layers_to_keep': '0'}"
    found = decode(pairs, path_of("sparsemixer"), tmp_path, "--beam", 2, "--model-overrides", kept)
    check_scores(found, partial(log_probabilities, pruned))
