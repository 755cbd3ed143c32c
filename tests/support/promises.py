"""What is promised, and the tests of each by file and name (with a parameter): properties, by hypothesis, and inputs at
the edge that others have stumbled over.
"""

from __future__ import annotations

BLOCK = "tests/lowering/test_block_properties.py"
LAYER = "tests/diffulex/moe/test_layer.py"
METADATA = "tests/diffulex/moe/test_metadata.py"
RANKS = "tests/diffulex/moe/test_parallel_layers.py"
ROUTE = "tests/lowering/ops/test_moe_route.py"
DISPATCH = "tests/lowering/ops/test_moe_dispatch.py"
COMPILED = "tests/diffulex/moe/test_layer_compile.py"
AT_THE_EDGE = "tests/lowering/test_edges.py"
KERNELS = "tests/lowering/templates/test_eager.py"
FORMS = f"{BLOCK}::test_named_forms_equal_the_oracle"

Promises = dict[str, tuple[str, ...]]

PROPERTIES: Promises = {
    "an op equals its oracle": (
        f"{BLOCK}::test_equals_the_oracle",
        f"{ROUTE}::test_every_option_equals_the_reference",
        f"{DISPATCH}::test_equals_reference",
    ),
    "a layer equals the naive layer": (f"{LAYER}::test_equals_the_oracle",),
    "gradients equal the oracle's": (
        f"{BLOCK}::test_gradients_equal_those_of_the_oracle",
        f"{LAYER}::test_gradients_equal_those_of_the_oracle",
    ),
    "tokens may be permuted": (f"{BLOCK}::test_permuting_tokens_permutes_outputs",),
    "experts may be permuted": (f"{BLOCK}::test_relabelling_experts_changes_nothing",),
    "slots of a token may be permuted": (f"{BLOCK}::test_order_of_a_tokens_experts_does_not_matter",),
    "a batch may be split": (f"{BLOCK}::test_splitting_the_batch_changes_nothing",),
    "rows of padding change nothing": (f"{BLOCK}::test_rows_of_padding_change_nothing",),
    "no tokens, no result, no gradient": (f"{BLOCK}::test_no_tokens",),
    "K = E is a dense layer": (f"{BLOCK}::test_every_expert_with_equal_weights_is_the_dense_average",),
    "one-hot weights are one expert": (
        f"{BLOCK}::test_one_expert_with_weight_one_is_its_dense_mlp",
        f"{BLOCK}::test_one_hot_routing_is_one_dense_mlp_a_token",
    ),
    "linear in the weights": (
        f"{BLOCK}::test_scaling_the_weights_scales_the_output",
        f"{BLOCK}::test_the_output_is_linear_in_the_weights",
    ),
    "compiled equals eager": (f"{COMPILED}::test_compiled_equals_eager",),
    "ranks equal one rank": (
        f"{RANKS}::test_naive_exchange_equals_one_rank_bitwise",
        f"{RANKS}::test_static_exchange_equals_one_rank_bitwise",
        f"{RANKS}::test_sums_over_ranks_equal_one_rank",
    ),
    "metadata of the slots": (f"{METADATA}::test_execution_is_the_sorted_slots",),
    "a bad token stays alone": (
        f"{BLOCK}::test_a_bad_token_stays_alone",
        f"{BLOCK}::test_a_bad_weight_stays_in_its_token",
    ),
    "the same bits twice": (f"{BLOCK}::test_bitwise_repeatable",),
}

EDGES: Promises = {
    "no tokens": (f"{FORMS}[no_tokens-cpu]", f"{BLOCK}::test_no_tokens"),
    "one token": (f"{FORMS}[one_token-cpu]",),
    "experts without tokens": (
        f"{FORMS}[empty_experts-cpu]",
        f"{AT_THE_EDGE}::test_experts_without_rows_have_no_gradient",
    ),
    "all tokens to one expert": (
        f"{FORMS}[one_expert_gets_all-cpu]",
        f"{KERNELS}::test_more_row_tiles_than_a_group",
    ),
    "K = 1": (f"{FORMS}[top1-cpu]",),
    "K = E": (f"{FORMS}[every_expert-cpu]",),
    "E = 1": (f"{FORMS}[one_expert-cpu]",),
    "sizes that are no multiples of a tile": (f"{FORMS}[primes-cpu]", f"{KERNELS}::test_schedules"),
    "an expert twice in a token": (
        f"{FORMS}[duplicates-cpu]",
        f"{BLOCK}::test_choosing_an_expert_twice_adds_its_weights",
    ),
    "ids of -1, of E and beyond, of 2^31 - 1": (f"{FORMS}[sentinels-cpu]", f"{DISPATCH}::test_equals_reference"),
    "stale ids in padded rows": (f"{AT_THE_EDGE}::test_stale_ids_in_padded_rows",),
    "NaN in padded rows": (f"{BLOCK}::test_rows_of_padding_change_nothing",),
    "NaN and infinities in logits": (
        f"{AT_THE_EDGE}::test_bad_logits_stay_in_their_token",
        f"{ROUTE}::test_nan_stays_in_its_row",
    ),
    "NaN and infinities in one token": (
        f"{BLOCK}::test_a_bad_token_stays_alone",
        f"{KERNELS}::test_nan_stays_in_its_rows",
    ),
    "NaN and infinities in one expert": (f"{AT_THE_EDGE}::test_a_bad_expert_reaches_its_own_tokens_alone",),
    "inputs that are not contiguous": (
        f"{AT_THE_EDGE}::test_views_of_larger_tensors",
        f"{KERNELS}::test_strided_inputs",
    ),
    "inputs of stride zero": (f"{AT_THE_EDGE}::test_rows_that_lie_on_one_another",),
    "gradients of stride zero": (f"{AT_THE_EDGE}::test_gradients_of_stride_zero",),
    "weights that need no gradient": (f"{AT_THE_EDGE}::test_any_of_the_inputs_may_need_no_gradient",),
    "inference tensors": (f"{AT_THE_EDGE}::test_inference_tensors",),
    "recomputed layers route alike": (
        f"{AT_THE_EDGE}::test_recomputing_routes_alike",
        f"{LAYER}::test_activation_checkpointing_changes_no_gradient",
    ),
    "offsets beyond 32 bits": (
        "tests/lowering/templates/test_wide_indices.py::test_rows_times_strides_are_64_bits_wide",
        f"{KERNELS}::test_offsets_beyond_32_bits",
    ),
    "a rank without tokens": (f"{RANKS}::test_ranks_without_tokens",),
    "a rank that ends or stands still": ("tests/diffulex/distributed/test_faults.py::test_a_lost_rank_is_named",),
}
