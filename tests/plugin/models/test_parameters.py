"""Total and active parameters, compared with explicit counts."""

from fairseq_sparsemixer.plugin.models import parameter_counts


def test_active_parameters_exclude_unused_experts(build_translation_model):
    model = build_translation_model(num_experts=4)  # one MoE layer per stack, M = 16, H = 32
    expert = 16 * 32 + 32 + 32 * 16 + 16
    total, active = parameter_counts(model)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert total - active == 2 * 3 * expert


def test_with_two_experts_per_token_both_are_active(build_translation_model):
    one, two = (build_translation_model(router="sparsemixer_v2", moe_top_k=k) for k in (1, 2))
    assert parameter_counts(two)[1] - parameter_counts(one)[1] == 2 * (16 * 32 + 32 + 32 * 16 + 16)


def test_all_parameters_of_a_dense_model_are_active(build_translation_model):
    total, active = parameter_counts(build_translation_model(router="dense"))
    assert total == active
