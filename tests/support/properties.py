"""The properties that are promised, and the hypothesis tests that each consists of, by file and name."""

from __future__ import annotations

BLOCK = "tests/lowering/test_block_properties.py"
LAYER = "tests/diffulex/moe/test_layer.py"
METADATA = "tests/diffulex/moe/test_metadata.py"
RANKS = "tests/diffulex/moe/test_parallel_layers.py"
ROUTE = "tests/lowering/ops/test_moe_route.py"
DISPATCH = "tests/lowering/ops/test_moe_dispatch.py"
COMPILED = "tests/diffulex/moe/test_layer_compile.py"

PROPERTIES: dict[str, tuple[str, ...]] = {
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
