"""Gating dropout: the coin, and tokens that stay on their rank, compared with the formula on one process."""

import math
from itertools import product

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fairseq_sparsemixer.moe.cmr import ConditionalRouting
from fairseq_sparsemixer.moe.gates import build_gate
from fairseq_sparsemixer.moe.gating_dropout import require_local_routing, stays_on_rank
from fairseq_sparsemixer.moe.gradients import reduce_expert_gradients
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import form_expert_group
from fairseq_sparsemixer.moe.turns import taking_turns

M, H, E = 6, 10, 4
TOKENS = (7, 16)  # of the two ranks
CASES = {  # router and options; none draws noise
    "switch": dict(router="switch", jitter_eps=0.0),
    "top-2": dict(router="topk", top_k=2),
    "GShard with a capacity": dict(router="gshard", second_expert_policy="all", capacity_factor=0.7),
    "expert choice": dict(router="expert_choice"),
    "conditional routing": dict(router="switch", jitter_eps=0.0, cmr=True),
}


def test_the_coin_has_its_probability_and_depends_on_each_number():
    drawn = [stays_on_rank(0.3, seed, update, batch) for seed, update, batch in product((1, 2), range(2000), (0, 1))]
    assert abs(sum(drawn) / len(drawn) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / len(drawn))
    assert not any(stays_on_rank(0.0, 1, update, 0) for update in range(100))
    sequences = [
        [stays_on_rank(0.5, s, u + n, b) for n in range(64)] for s, u, b in ((1, 0, 0), (2, 0, 0), (1, 64, 0), (1, 0, 1))
    ]
    assert all(sequences[0] != other for other in sequences[1:])
    columns = list(zip(*[iter(drawn)] * 2))  # (batch 0, batch 1) of each update
    both = sum(a and b for a, b in columns) / len(columns)
    assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / len(columns))  # independent


def test_the_coin_does_not_touch_the_random_states():
    torch_state, before = torch.get_rng_state(), stays_on_rank(0.5, 1, 2, 3)
    torch.manual_seed(9)
    seeded = torch.get_rng_state()
    assert stays_on_rank(0.5, 1, 2, 3) is before and torch.equal(torch.get_rng_state(), seeded)
    torch.set_rng_state(torch_state)


def test_with_all_experts_on_the_rank_nothing_changes():
    layer = build_moe_layer("switch", M, H, E, jitter_eps=0.0)
    x = torch.randn(9, M)
    expected = layer(x)
    layer.stay_on_rank = True
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("probability, router, sentence", [
    (1.0, "switch", "gating_dropout=1.0 must be at least 0 and less than 1"),
    (0.2, "default_moe", "gating_dropout=0.2 does not work with router=default_moe"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(probability, router, sentence):
    with pytest.raises(ValueError, match=sentence):
        require_local_routing(build_gate(router, M, E), probability)


def batch():
    """Tokens x and upstream gradients [sum(TOKENS), M], padding [sum(TOKENS)], in float64."""
    generator = torch.Generator().manual_seed(8)
    x, upstream = (torch.randn(sum(TOKENS), M, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, upstream, torch.rand(sum(TOKENS), generator=generator) < 0.2


def layer_of(options):
    torch.manual_seed(3)
    options = dict(options)
    if options.pop("cmr", False):
        options["cmr"] = ConditionalRouting(M, H)
    return build_moe_layer(options.pop("router"), M, H, E, **options).double()


def on_rank(backend):
    """Output, gradients (experts' of this rank), and the exchanges made, of a batch that stays and of one that does not."""
    group, rank = form_expert_group(2), dist.get_rank()
    start = sum(TOKENS[:rank])
    found = {}
    exchange, calls = dist.all_to_all_single, []
    dist.all_to_all_single = lambda *args, **kwargs: calls.append(1) or exchange(*args, **kwargs)
    for name, stay in product(CASES, (True, False)):
        layer = layer_of(CASES[name])
        shard_experts(layer, group)
        layer.stay_on_rank = stay
        wrapped = DistributedDataParallel(layer) if backend == "pytorch_ddp" else layer
        x, upstream, padding = (part[start : start + TOKENS[rank]] for part in batch())
        calls.clear()
        output = wrapped(x, padding)
        (output * upstream).sum().backward()
        if backend == "legacy_ddp":
            for parameter in (p for p in layer.parameters() if not hasattr(p, "expert")):
                dist.all_reduce(parameter.grad.div_(2))
        reduce_expert_gradients(layer, group)
        gradients = {key: 2 * parameter.grad for key, parameter in layer.named_parameters()}
        found[name, stay] = output.detach(), gradients, len(calls)
        if stay:
            with torch.no_grad(), taking_turns([layer]):
                found[name, "generates"] = layer(x, padding)
    return found


def by_formula(layer, x, padding, rank, stay):
    """sum_i w_i f_(r L + e_i mod L)(x) for the tokens of rank r; with stay False, sum_i w_i f_(e_i)(x). With CMR, mixed."""
    routing = layer.gate(x, padding)
    index, local = routing.expert_index, E // 2
    if stay:
        index = rank * local + index % local
    hidden = torch.relu(torch.einsum("sm,emh->seh", x, layer.experts.weight_in) + layer.experts.bias_in)
    outputs = torch.einsum("seh,ehm->sem", hidden, layer.experts.weight_out) + layer.experts.bias_out
    chosen = outputs.gather(1, index.unsqueeze(-1).expand(-1, -1, M))
    output = (routing.combine_weight.unsqueeze(-1) * chosen).sum(1)
    if layer.cmr is None:
        return output
    shared, g = layer.cmr.shared, torch.sigmoid(x @ layer.cmr.gate.weight[0] + layer.cmr.gate.bias).unsqueeze(-1)
    dense = torch.relu(x @ shared.weight_in[0] + shared.bias_in[0]) @ shared.weight_out[0] + shared.bias_out[0]
    return ((1 - g) * dense + g * output).masked_fill(padding.unsqueeze(-1), 0)


@pytest.fixture(scope="module", params=["legacy_ddp", "pytorch_ddp"])
def outcomes(request):
    return run_ranks(2, on_rank, request.param)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_generation_within_the_step_of_a_batch_that_stays_exchanges_tokens(case, outcomes):
    for outcome in outcomes:
        torch.testing.assert_close(outcome[case, "generates"], outcome[case, False][0])


@pytest.mark.distributed
@pytest.mark.parametrize("stay", [True, False], ids=["stays", "travels"])
@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks_outputs_and_gradients_equal_the_formula(case, stay, outcomes):
    layer = layer_of(CASES[case])
    x, upstream, padding = batch()
    start = 0
    for rank, count in enumerate(TOKENS):
        part = slice(start, start + count)
        start += count
        expected = by_formula(layer, x[part], padding[part], rank, stay)
        output, _, exchanges = outcomes[rank][case, stay]
        torch.testing.assert_close(output, expected)
        assert (exchanges == 0) is stay  # nothing is sent, forward or backward
        (expected * upstream[part]).sum().backward()
    for name, parameter in layer.named_parameters():
        parts = [gradients[name] for _, gradients, _ in (outcome[case, stay] for outcome in outcomes)]
        found = torch.cat(parts) if name.startswith("experts.") else parts[0]
        torch.testing.assert_close(found, parameter.grad, msg=name)
