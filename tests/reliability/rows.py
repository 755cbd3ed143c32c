"""The figures that are claimed: what is asked of each, which tests show it, and how it is read off their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tests.support.examples_plugin import EXAMPLES
from tests.support.promises import EDGES, PROPERTIES, Promises

from .results import Results

Measure = Callable[[Results, tuple[str, ...]], tuple[str, bool]]  # what was measured, and whether it is what is asked


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure. gpu: it is measured on a GPU."""

    figure: str
    asked: str
    tests: tuple[str, ...]
    measure: Measure
    gpu: bool = False

    def measured(self, results: Results) -> tuple[str, bool]:
        """What the results say of it, and whether that is what is asked."""
        problem = results.problem(self.tests)
        return (problem, False) if problem else self.measure(results.of(self.tests), self.tests)


def passed(results: Results, tests: tuple[str, ...]) -> tuple[str, bool]:
    """All tests hold."""
    skipped = results.count("skipped")
    return f"{results.count('passed')} tests pass" + (f", {skipped} cannot run here" if skipped else ""), True


def _properties(results: Results, tests: tuple[str, ...]) -> tuple[str, bool]:
    counts = [int(sum(results.of(names).numbers(EXAMPLES))) for names in PROPERTIES.values()]
    text = f"{len(counts)} properties, {min(counts)} examples or more each, {sum(counts):,} in all"
    return text, len(counts) >= 12 and min(counts) >= 50


def _edges(results: Results, tests: tuple[str, ...]) -> tuple[str, bool]:
    return f"{len(EDGES)} edges, {results.count('passed')} tests pass", True


def most(name: str, text: str, *, bound: float) -> Measure:
    """The largest number recorded under a name is within a bound."""

    def measure(results: Results, tests: tuple[str, ...]) -> tuple[str, bool]:
        found = results.numbers(name)
        if not found:
            return f"nothing recorded as {name}", False
        return text.format(max(found), count=len(found)), max(found) <= bound

    return measure


def least(name: str, text: str, *, bound: float, total: bool = False) -> Measure:
    """The smallest number recorded under a name, or their sum, reaches a bound."""

    def measure(results: Results, tests: tuple[str, ...]) -> tuple[str, bool]:
        found = results.numbers(name)
        if not found:
            return f"nothing recorded as {name}", False
        value = sum(found) if total else min(found)
        return text.format(value, count=len(found)), value >= bound

    return measure


def every(*measures: Measure) -> Measure:
    """All of them."""

    def measure(results: Results, tests: tuple[str, ...]) -> tuple[str, bool]:
        texts, holds = zip(*(one(results, tests) for one in measures), strict=True)
        return "; ".join(texts), all(holds)

    return measure


def _all_of(table: Promises) -> tuple[str, ...]:
    return tuple(dict.fromkeys(test for tests in table.values() for test in tests))


OPS, MOE, INDUCTOR = "tests/lowering/ops", "tests/diffulex/moe", "tests/lowering/inductor"
DETERMINISTIC = "tests/diffulex/test_deterministic.py"
PROOFS = "tests/diffulex/test_proofs_on_gpu.py"
FAMILIES_ON_GPU = "tests/diffulex/test_families_gpu.py"
# begun first, since each of these tests may take minutes; and tensors of 10 GB and more, one test at a time
LONG = (f"{OPS}/test_sanitized_on_gpu.py", f"{INDUCTOR}/test_batch_invariant_on_gpu.py", FAMILIES_ON_GPU, PROOFS)
LARGE = (f"{OPS}/test_wide_indices_on_gpu.py",)
ONE_DIGEST = every(
    most("digests_of_100_forwards", "{:.0f} digest in 100 forwards", bound=1),
    most("digests_of_40_steps", "{:.0f} in 40 forwards and backwards ({count} cases)", bound=1),
)

CPU = (
    Row("properties, by hypothesis", "12 properties, 50 examples each", _all_of(PROPERTIES), _properties),
    Row("inputs at the edge", "all pass", _all_of(EDGES), _edges),
    Row("accuracy: error against fp64", "mean 1.1 x, max 2 x eager's; fp32 10 x", (
        "tests/lowering/test_block_properties.py::test_error_ratio",
        f"{MOE}/test_parallel_layers.py::test_rounding_is_that_of_one_rank",
        "tests/lowering/templates/test_eager.py::test_schedules",
    ), passed),
    Row("contracts of the ops (`opcheck`)", "every op, 4 utilities", (f"{OPS}/test_registry.py",), passed),
    Row("graphs over token counts from 0 to 512", "3 at most", (
        f"{MOE}/test_layer_compile.py::test_at_most_three_graphs_over_token_counts",
        f"{MOE}/test_layer_compile.py::test_training_in_at_most_three_graphs",
    ), passed),
    Row("the same bits every time", "1 digest", (f"{DETERMINISTIC}::test_eager", f"{DETERMINISTIC}::test_compiled"),
        ONE_DIGEST),
    Row("batch invariance, opt-in: 1, 4, 16, 64, 257, 1024 tokens", "the same bits; without it, others", (
        f"{OPS}/test_rows.py",
        f"{INDUCTOR}/test_batch_invariant.py",
    ), every(
        most("differing_counts", "{:.0f} counts differ", bound=0),
        least("differing_counts_of_the_control", "without it {:.0f}", bound=1),
    )),
    Row("tuned times and kept reports: cut off at 64 places, bits flipped, another form, disks full and read-only, "
        "writers killed, 8 processes x 20 rounds", "a miss and one warning", (
        "tests/lowering/schedule/test_storage.py",
        f"{INDUCTOR}/test_kept.py::test_entries_cut_off_anywhere",
        f"{INDUCTOR}/test_kept.py::test_entries_with_any_bit_flipped",
        f"{INDUCTOR}/test_kept.py::test_what_cannot_be_read_is_warned_about_once",
    ), passed),
    Row("code of another version or mode is never served", "a miss", (
        f"{INDUCTOR}/test_cache_identity.py",
        f"{INDUCTOR}/test_identity.py",
    ), passed),
    Row("8 threads, 8 processes compile a block first at once", "the same bits, no deadlock", (
        "tests/diffulex/test_first_compile.py",
    ), every(
        least("at_once", "{:.0f} at once", bound=8),
        most("digests", "{:.0f} digest, that of eager mode", bound=1),
    )),
    Row("several ranks and one", "the same bits (naive, static)", (
        f"{MOE}/test_parallel_layers.py::test_naive_exchange_equals_one_rank_bitwise",
        f"{MOE}/test_parallel_layers.py::test_static_exchange_equals_one_rank_bitwise",
        f"{MOE}/test_parallel_layers.py::test_ranks_without_tokens",
    ), passed),
    Row("a rank killed or stuck, not the job's store", "the others name it in an error, in 5 s, stuck of the limit", (
        "tests/diffulex/distributed/test_faults.py::test_a_lost_rank_is_named",
    ), most("seconds_over_the_limit", "its number, at most {:+.1f} s from that ({count} cases)", bound=5)),
    Row("5 families, 20 steps on a text: error of the losses against fp64; routing", "10 x eager's (fp32); bitwise", (
        "tests/diffulex/test_convergence.py",
    ), most("error_of_losses_over_eagers", "at most {:.2f} x eager's; bitwise ({count} families)", bound=10)),
    Row("checkpoints of transformers, there and back", "bitwise", (
        "tests/diffulex/checkpoint/test_round_trip.py",
    ), passed),
    Row("nothing is unpickled, no stranger's word in generated code, private files", "no exception", (
        "tests/test_threats.py",
        "tests/test_house.py::test_gate_holds[unsafe]",
    ), passed),
)  # fmt: skip

GPU = tuple(dataclasses.replace(row, gpu=True) for row in (
    Row("waits for the device, forward and backward", "0", (
        f"{PROOFS}::test_nobody_waits_for_the_device",
        f"{PROOFS}::test_a_wait_is_seen",
        f"{FAMILIES_ON_GPU}::test_no_host_sync",
    ), most("waits", "{:.0f} ({count} cases)", bound=0)),
    Row("copies to the host in the profile", "0", (
        f"{PROOFS}::test_nothing_is_copied_to_the_host",
        f"{PROOFS}::test_a_copy_is_seen",
    ), most("copies_to_the_host", "{:.0f} ({count} cases)", bound=0)),
    Row("regimes that CUDA graphs take", "all", (
        f"{PROOFS}::test_cuda_graphs_take_every_regime",
        f"{PROOFS}::test_the_regimes_are_different_ones",
        f"{FAMILIES_ON_GPU}::test_cuda_graphs_capture",
    ), least("regimes_captured", "{:.0f} captured and replayed", bound=30, total=True)),
    Row("peak memory over what is stated", "1.05", (
        f"{PROOFS}::test_peak_memory_is_what_is_stated",
    ), most("peak_over_stated", "{:.3f} at most ({count} cases)", bound=1.05)),
    Row("the same bits every time", "1 digest", (f"{DETERMINISTIC}::test_eager", f"{DETERMINISTIC}::test_compiled"),
        ONE_DIGEST),
    Row("batch invariance, opt-in: 1, 4, 16, 64, 257, 1024 tokens", "the same bits; without it, others", (
        f"{INDUCTOR}/test_batch_invariant_on_gpu.py",
    ), passed),
    Row("products of indices beyond 2^31, forward and backward", "right", (
        f"{OPS}/test_wide_indices_on_gpu.py",
        f"{OPS}/test_moe_route.py::test_more_than_two_to_the_31_logits",
    ), least("elements", "right with {:,.0f} elements and more ({count} cases)", bound=2**31)),
    Row("cases under compute-sanitizer: memcheck, racecheck", "20, no report", (
        f"{OPS}/test_sanitized_on_gpu.py::test_no_bad_access_and_no_race",
        f"{OPS}/test_sanitized_on_gpu.py::test_nor_by_descriptors",
    ), least("sanitized_cases", "{:.0f} in all, no report", bound=2 * 20, total=True)),
    Row("inputs at the edge", "all pass", (
        "tests/lowering/test_edges.py",
        "tests/lowering/test_block_properties.py::test_named_forms_equal_the_oracle",
    ), passed),
    Row("accuracy: error against fp64", "mean 1.1 x, max 2 x eager's; fp32 10 x", (
        "tests/lowering/test_block_properties.py::test_error_ratio",
        f"{FAMILIES_ON_GPU}::test_block_ratio_rule",
        f"{FAMILIES_ON_GPU}::test_training_step_matches_eager",
    ), passed),
    Row("contracts of the ops (`opcheck`)", "every op, 4 utilities", (f"{OPS}/test_registry.py",), passed),
    Row("kernels of a layer, 1 and 64 tokens", "7 at most", (f"{FAMILIES_ON_GPU}::test_kernels_per_layer",), passed),
))  # fmt: skip
