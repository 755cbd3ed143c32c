"""The inputs at the edge that others have stumbled over, and the test of each, by file and name (with a parameter)."""

from __future__ import annotations

BLOCK = "tests/lowering/test_block_properties.py"
EDGES_OF_BLOCKS = "tests/lowering/test_edges.py"
LAYER = "tests/diffulex/moe/test_layer.py"
DISPATCH = "tests/lowering/ops/test_moe_dispatch.py"
ROUTE = "tests/lowering/ops/test_moe_route.py"
KERNELS = "tests/lowering/templates/test_eager.py"
RANKS = "tests/diffulex/moe/test_parallel_layers.py"
FORMS = f"{BLOCK}::test_named_forms_equal_the_oracle"

EDGES: dict[str, tuple[str, ...]] = {
    "no tokens": (f"{FORMS}[no_tokens-cpu]", f"{BLOCK}::test_no_tokens"),
    "one token": (f"{FORMS}[one_token-cpu]",),
    "experts without tokens": (
        f"{FORMS}[empty_experts-cpu]",
        f"{EDGES_OF_BLOCKS}::test_experts_without_rows_have_no_gradient",
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
    "stale ids in padded rows": (f"{EDGES_OF_BLOCKS}::test_stale_ids_in_padded_rows",),
    "NaN in padded rows": (f"{BLOCK}::test_rows_of_padding_change_nothing",),
    "NaN and infinities in logits": (
        f"{EDGES_OF_BLOCKS}::test_bad_logits_stay_in_their_token",
        f"{ROUTE}::test_nan_stays_in_its_row",
    ),
    "NaN and infinities in one token": (
        f"{BLOCK}::test_a_bad_token_stays_alone",
        f"{KERNELS}::test_nan_stays_in_its_rows",
    ),
    "NaN and infinities in one expert": (f"{EDGES_OF_BLOCKS}::test_a_bad_expert_reaches_its_own_tokens_alone",),
    "inputs that are not contiguous": (
        f"{EDGES_OF_BLOCKS}::test_views_of_larger_tensors",
        f"{KERNELS}::test_strided_inputs",
    ),
    "inputs of stride zero": (f"{EDGES_OF_BLOCKS}::test_rows_that_lie_on_one_another",),
    "gradients of stride zero": (f"{EDGES_OF_BLOCKS}::test_gradients_of_stride_zero",),
    "weights that need no gradient": (f"{EDGES_OF_BLOCKS}::test_any_of_the_inputs_may_need_no_gradient",),
    "inference tensors": (f"{EDGES_OF_BLOCKS}::test_inference_tensors",),
    "recomputed layers route alike": (
        f"{EDGES_OF_BLOCKS}::test_recomputing_routes_alike",
        f"{LAYER}::test_activation_checkpointing_changes_no_gradient",
    ),
    "offsets beyond 32 bits": (
        "tests/lowering/templates/test_wide_indices.py::test_rows_times_strides_are_64_bits_wide",
        f"{KERNELS}::test_offsets_beyond_32_bits",
    ),
    "a rank without tokens": (f"{RANKS}::test_ranks_without_tokens",),
    "a rank that ends or stands still": ("tests/diffulex/distributed/test_faults.py::test_a_lost_rank_is_named",),
}
