"""Faults that someone could make: each a text of one file and what stands there instead, and the tests that see it.

Spread over what a result depends on. A test that merely compares texts (tests/expected) is in no list: it would see any
change. `tests/mutants/test_mutants.py` checks that each still applies, `python -m tests.mutants` that each is seen.
"""

from __future__ import annotations

import dataclasses

OPS, TEMPLATES, INDUCTOR = "tests/lowering/ops", "tests/lowering/templates", "tests/lowering/inductor"
GRAPH, SCHEDULE = "tests/lowering/graph", "tests/lowering/schedule"
PARALLEL, MOE = "tests/diffulex/distributed", "tests/diffulex/moe"

PROPERTIES = ("tests/lowering/test_block_properties.py",)
GEMM = (f"{TEMPLATES}/test_eager.py",)
DISPATCH = (f"{OPS}/test_moe_dispatch.py",)
ROUTE = (f"{OPS}/test_moe_route.py",)
ROUTE_LINEAR = (f"{INDUCTOR}/test_route_linear_lowerings.py",)
BLOCK = (f"{INDUCTOR}/test_generated_block.py",)
IDENTITY = (f"{INDUCTOR}/test_identity.py",)
STORAGE = (f"{SCHEDULE}/test_storage.py",)
RANKS = (f"{MOE}/test_parallel_layers.py",)
SYMMETRIC = (f"{PARALLEL}/test_symmetric.py",)


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` stands in `file` once; with `new` in its place one of `tests` fails. `only`: pytest's -k."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    only: str = ""


FAULTS = (
    # templates: the expert GEMMs
    Fault(
        "rows past an expert's end are written",
        "lowering/templates/moe_expert_gemm.jinja",
        "    mask = (row < end)[:, None] & (column < << width >>)[None, :]\n",
        "    mask = (row < NUM_ROWS)[:, None] & (column < << width >>)[None, :]\n",
        GEMM,
        "test_forms or test_rows_of_no_expert",
    ),
    Fault(
        "gate and up are swapped",
        "lowering/templates/render.py",
        'self.act_text(gate="acc", up="acc_up")',
        'self.act_text(gate="acc_up", up="acc")',
        GEMM,
        "test_activations and not many",
    ),
    Fault(
        "programs do not wait for one another",
        "lowering/templates/moe_expert_gemm_specialized.jinja",
        "(gl.load(PROGRESS, volatile=True) < goal)",
        "(gl.load(PROGRESS, volatile=True) < 0)",
        (f"{TEMPLATES}/test_specialized.py",),
        "waits_for_the_others",
    ),
    Fault(
        "the next expert's weights",
        "lowering/templates/moe_expert_gemm.jinja",
        "    expert = tl.sum(tl.where(found_E, expert_E, 0), 0)\n",
        "    expert = tl.minimum(tl.sum(tl.where(found_E, expert_E, 0), 0) + 1, NUM_EXPERTS - 1)\n",
        GEMM,
        "test_forms and not many and not descriptors",
    ),
    Fault(
        "a row tile begins one row late",
        "lowering/templates/moe_expert_gemm.jinja",
        "    start = tl.sum(tl.where(found_E, lo_E + (tile_m - ends_E + tiles_E) * BLOCK_M, 0), 0)\n",
        "    start = tl.sum(tl.where(found_E, lo_E + (tile_m - ends_E + tiles_E) * BLOCK_M, 0), 0) + (tile_m > 0)\n",
        GEMM,
        "test_forms and not many and not descriptors",
    ),
    Fault(
        "the depth is not masked",
        "lowering/templates/render.py",
        "depth % schedule.block_k == 0, is_transposed(strides)",
        "True, is_transposed(strides)",
        GEMM,
        "test_schedules",
    ),
    Fault(
        "rows of no expert are computed",
        "lowering/templates/moe_expert_gemm.jinja",
        "    depth = tl.where(is_tail, 0, WIDTH_K)\n",
        "    depth = WIDTH_K\n",
        GEMM,
        "test_rows_of_no_expert or test_forms",
    ),
    Fault(
        "rows of no expert have a bias",
        "lowering/templates/moe_expert_gemm.jinja",
        "    acc += tl.where(is_tail, 0.0, tl.load(bias_ptr).to(tl.float32))[None, :]\n",
        "    acc += tl.load(bias_ptr).to(tl.float32)[None, :]\n",
        GEMM,
        "test_forms and not many and not descriptors",
    ),
    Fault(
        "rows are numbered in 32 bits",
        "lowering/templates/moe_expert_gemm.jinja",
        "    a_row = (slot // TOP_K).to(tl.int64)\n",
        "    a_row = slot // TOP_K\n",
        (f"{TEMPLATES}/test_wide_indices.py",),
    ),
    Fault(
        "experts are numbered in 32 bits",
        "lowering/templates/moe_expert_gemm.jinja",
        "<% else %>\n    a_ptr = A + a_row[:, None] * stride_am + k[None, :] * stride_ak\n"
        "    w_base = W + expert.to(tl.int64) * stride_we\n",
        "<% else %>\n    a_ptr = A + a_row[:, None] * stride_am + k[None, :] * stride_ak\n"
        "    w_base = W + expert * stride_we\n",
        (f"{TEMPLATES}/test_wide_indices.py",),
    ),
    Fault(
        "outputs are numbered in 32 bits",
        "lowering/templates/eager.py",
        't.numel() >= 2**31 for t in tensors) else "tl.int32"',
        't.numel() > 2**32 for t in tensors) else "tl.int32"',
        GEMM,
        "test_offsets_beyond_32_bits",
    ),
    Fault(
        "down writes rows where they stand in expert order",
        "lowering/templates/eager.py",
        "    return ExpertGemmVariant(gather=False, scatter=True, bias=bias,",
        "    return ExpertGemmVariant(gather=False, scatter=False, bias=bias,",
        GEMM,
        "test_forms and not many and not descriptors",
    ),
    Fault(
        "with descriptors a tile is stored past its expert's end",
        "lowering/templates/moe_expert_gemm_tma.jinja",
        "        mask = (row < end)[:, None] & (column_<< part >> < WIDTH_N)[None, :]\n",
        "        mask = (row < NUM_ROWS)[:, None] & (column_<< part >> < WIDTH_N)[None, :]\n",
        GEMM,
        "descriptors_take or no_expert",
    ),
    Fault(
        "with descriptors a group's last tiles repeat",
        "lowering/templates/moe_expert_gemm_tma.jinja",
        "        start = lo + (group * GROUP_M + inside % size) * BLOCK_M\n",
        "        start = lo + (group + inside % size) * BLOCK_M\n",
        GEMM,
        "more_row_tiles",
    ),
    Fault(
        "a weight's gradient misses rows",
        "lowering/templates/moe_expert_grad_weight.jinja",
        "    for row0 in range(start, end, BLOCK_K):\n",
        "    for row0 in range(start, end - 1, BLOCK_K):\n",
        GEMM,
        "test_grad_weight",
    ),
    Fault(
        "a weight's gradient has other experts' rows",
        "lowering/templates/moe_expert_grad_weight.jinja",
        "        inside = row < end\n",
        "        inside = row < end + 1\n",
        GEMM,
        "test_grad_weight",
    ),
    # templates: dispatch and routers
    Fault(
        "the sort is not stable",
        "lowering/templates/moe_dispatch_place.jinja",
        "        sorted_B = tl.sort(bin_B * BLOCK + at_B)\n",
        "        sorted_B = tl.sort(bin_B * BLOCK + (BLOCK - 1 - at_B))\n",
        DISPATCH,
        "interpreter",
    ),
    Fault(
        "offsets one too small",
        "lowering/templates/moe_dispatch.jinja",
        "        less_B += (ids_B < own).to(tl.int32)\n",
        "        less_B += (ids_B + 1 < own).to(tl.int32)\n",
        DISPATCH,
        "interpreter",
    ),
    Fault(
        "ids beyond the experts are counted",
        "lowering/templates/moe_dispatch_count.jinja",
        "        valid_B = (ids_B >= 0) & (ids_B < NUM_EXPERTS)\n",
        "        valid_B = ids_B >= 0\n",
        DISPATCH,
        "interpreter",
    ),
    Fault(
        "places are counted from where the block began",
        "lowering/templates/moe_dispatch_place.jinja",
        "        place_C += count_C\n",
        "        place_C += 0\n",
        DISPATCH,
        "interpreter",
    ),
    Fault(
        "the highest index wins a tie",
        "lowering/templates/moe_route_select.jinja",
        "        winner_T = tl.min(tl.where(key_TC == top_T[:, None], expert_C[None, :], NUM_EXPERTS), 1)\n",
        "        winner_T = tl.max(tl.where(key_TC == top_T[:, None], expert_C[None, :], -1), 1)\n",
        ROUTE,
        "interpreter",
    ),
    Fault(
        "weights are not renormalised",
        "lowering/templates/moe_route_select.jinja",
        "    weights_TW = tl.where(valid_TW, weights_TW / norm_T[:, None], 0.0)\n",
        "    weights_TW = tl.where(valid_TW, weights_TW, 0.0)\n",
        ROUTE,
        "interpreter",
    ),
    Fault(
        "one group too many is kept",
        "lowering/templates/moe_route_select.jinja",
        "        for _ in range(TOPK_GROUP):\n",
        "        for _ in range(TOPK_GROUP + 1):\n",
        ROUTE,
        "interpreter",
    ),
    Fault(
        "the bias weighs",
        "lowering/templates/moe_route_select.jinja",
        "{% if BIAS_WEIGHS %}\n    bias_TW",
        "{% if BIAS_WEIGHS or HAS_BIAS %}\n    routed_TW = valid_TW\n    bias_TW",
        ROUTE,
        "interpreter",
    ),
    Fault(
        "a stretch of the router's product is left out",
        "lowering/templates/moe_route_linear_sum.jinja",
        "    for s in tl.range(0, SPLIT, loop_unroll_factor=UNROLL):\n",
        "    for s in tl.range(0, max(SPLIT - 1, 1), loop_unroll_factor=UNROLL):\n",
        ROUTE_LINEAR,
    ),
    # ops on the CPU and their gradients
    Fault(
        "negative ids are the last experts",
        "lowering/ops/moe_dispatch.py",
        "    unsigned_N = ids_N.view(np.uint32 if ids_N.dtype == np.int32 else np.uint64)",
        "    unsigned_N = ids_N % num_experts + ids_N // num_experts * 0",
        DISPATCH,
    ),
    Fault(
        "slots of a token are added up in any order",
        "lowering/ops/moe_combine.py",
        "    for k in range(1, top_k):",
        "    for k in reversed(range(1, top_k)):",
        (f"{OPS}/test_moe_combine.py",),
    ),
    Fault(
        "a slot is left out of the sum",
        "lowering/ops/moe_combine.py",
        "    for k in range(1, top_k):",
        "    for k in range(1, max(top_k - 1, 2) if top_k > 1 else 1):",
        PROPERTIES,
        "oracle",
    ),
    Fault(
        "slots of no expert keep what was there",
        "lowering/ops/moe_expert_down.py",
        "    slots_NH.index_fill_(0, order_N[bounds[-1] :].long(), 0.0)\n",
        "",
        PROPERTIES,
        "padding or named_forms or dropped_id",
    ),
    Fault(
        "rows of no expert keep what was there",
        "lowering/ops/moe_expert_up.py",
        "    out_NI[bounds[-1] :].zero_()\n",
        "",
        (f"{OPS}/test_moe_expert_up.py",),
    ),
    Fault(
        "gate and up are swapped in the backward",
        "lowering/ops/moe_expert_up.py",
        "        grad_NJ = torch.cat((grad_gate_NI, grad_up_NI), dim=1)\n",
        "        grad_NJ = torch.cat((grad_up_NI, grad_gate_NI), dim=1)\n",
        PROPERTIES,
        "gradients",
    ),
    Fault(
        "a weight's gradient is of the next expert",
        "lowering/ops/moe_expert_grad_weight.py",
        "out=grad_ELR[expert])",
        "out=grad_ELR[expert - 1])",
        PROPERTIES,
        "gradients",
    ),
    Fault(
        "a router's gradient leaves out the division",
        "lowering/ops/_route_backward.py",
        "        grad_TW = (grad_TW - inner_T1) / divisor_T1\n",
        "        grad_TW = grad_TW / divisor_T1\n",
        ROUTE,
        "gradcheck or grad",
    ),
    Fault(
        "ids that were given twice have one weight's gradient",
        "lowering/ops/_route_backward.py",
        "        values_TW = torch.where(same_TWW, values_TW.unsqueeze(1), 0.0).sum(2)\n",
        "",
        ROUTE,
        "grad",
    ),
    Fault(
        "the scale is left out",
        "lowering/ops/_route_aten.py",
        "    if spec.scale != 1:\n        weights_TW = weights_TW.mul_(spec.scale)\n",
        "",
        ROUTE,
        "test_every_option_equals_the_reference",
    ),
    Fault(
        "NaN is no greatest value",
        "lowering/ops/_route_aten.py",
        "    np.copyto(bits, 0x7FFFFFFF, where=values != values)\n",
        "",
        ROUTE,
        "not gpu and not interpreter",
    ),
    Fault(
        "rows go through together whatever is asked for",
        "lowering/ops/_rows.py",
        "    if count == 0 or not is_batch_invariant():\n",
        "    if True:\n",
        (f"{OPS}/test_rows.py", f"{OPS}/test_cpu_experts.py"),
    ),
    # graph passes
    Fault(
        "a bias is taken that is not of the sorted ids",
        "lowering/graph/spine_pass.py",
        '    require(is_output(index, slots.sort, index=0), "a bias that is not indexed by the sorted ids")\n',
        "",
        (f"{GRAPH}/test_spine_pass.py",),
    ),
    Fault(
        "a histogram of other bins is taken",
        "lowering/graph/spine_pass.py",
        '    require((low, high) == (0, bins - 1), f"the histogram covers [{low}, {high}] with {bins} bins")\n',
        "",
        (f"{GRAPH}/test_spine_pass.py",),
    ),
    Fault(
        "halves are read the wrong way round",
        "lowering/graph/gate_formula.py",
        '        (0, width // 2, 1): ("halves", "g"),\n        (width // 2, width, 1): ("halves", "u"),\n',
        '        (0, width // 2, 1): ("halves", "u"),\n        (width // 2, width, 1): ("halves", "g"),\n',
        (f"{GRAPH}/test_activation_pass.py",),
    ),
    Fault(
        "a formula is folded that something else reads",
        "lowering/graph/gate_formula.py",
        "            require(not escaped, detail, code=ReasonCode.SHARED_USE)\n",
        "",
        (f"{GRAPH}/test_gate_formula.py", f"{GRAPH}/test_activation_pass.py"),
    ),
    Fault(
        "weights divided by any sum are renormalised",
        "lowering/graph/route_formula.py",
        "    is_sum = is_row_reduction(denominator, numerator, aten.sum.dim_IntList)\n",
        "    is_sum = True\n",
        (f"{GRAPH}/test_route_formula.py",),
    ),
    Fault(
        "masks of other experts' groups are taken",
        "lowering/graph/_route_choice.py",
        "        require(any(has_shape(node, shape) for shape in shapes),",
        "        require(True or any(has_shape(node, shape) for shape in shapes),",
        (f"{GRAPH}/test_route_formula.py",),
    ),
    # Inductor: lowerings, plans, cache keys
    Fault(
        "the compiled sum leaves the weights out",
        "lowering/inductor/lowerings.py",
        "        total = _compat.add_product(total, slot, weight)\n",
        "        total = slot if total is None else lower[aten.add.Tensor](total, slot)\n",
        BLOCK,
    ),
    Fault(
        "which product of a sum is rounded is left to the assembler",
        "lowering/inductor/_compat.py",
        "    return make_pointwise(ops.fma)(left, right, total)\n",
        "    return make_pointwise(lambda x, y, z: ops.add(ops.mul(x, y), z))(left, right, total)\n",
        (f"{INDUCTOR}/test_lowerings.py",),
        "which_products_of_the_combine",
    ),
    Fault(
        "a kernel leaves slots unsorted for all",
        "lowering/inductor/unsorted_slots.py",
        "    if tokens != 1 or top_k is None or top_k > given",
        "    if top_k is None or top_k > given",
        (f"{INDUCTOR}/test_slots_in_place.py", f"{INDUCTOR}/test_unsorted_slots.py"),
    ),
    Fault(
        "a template is no part of the cache key",
        "lowering/schedule/storage.py",
        '        if path.suffix in (".py", ".jinja"):\n',
        '        if path.suffix == ".py":\n',
        (*IDENTITY, *STORAGE),
    ),
    Fault(
        "contents are no part of the cache key",
        "lowering/schedule/storage.py",
        "            digest.update(path.read_bytes())\n",
        "",
        (*IDENTITY, *STORAGE),
    ),
    Fault(
        "switches are no part of the cache key",
        "lowering/inductor/identity.py",
        "{''.join('01'[on] for on in switches())}",
        "0",
        IDENTITY,
    ),
    Fault(
        "one schedule too large a range",
        "lowering/schedule/plan.py",
        "(rows is not None and rows <= found.max_rows)",
        "(rows is not None and rows <= 2 * found.max_rows)",
        (f"{SCHEDULE}/test_plan.py", f"{SCHEDULE}/test_tuned.py"),
    ),
    Fault(
        "a checksum that fits anything",
        "lowering/schedule/storage.py",
        "    if text != _sealed(body):\n",
        "    if False:\n",
        STORAGE,
        "bit or form",
    ),
    Fault(
        "a file that others may write to is read",
        "lowering/schedule/storage.py",
        " or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):\n",
        ":\n",
        STORAGE,
        "others",
    ),
    Fault(
        "files are written without a lock",
        "lowering/schedule/storage.py",
        "                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "",
        STORAGE,
        "many_processes or lock",
    ),
    # ranks: collectives, dispatchers, placement, checkpoints
    Fault(
        "an exchange does not wait for the writes",
        "diffulex/distributed/symmetric.py",
        "        self.handle.barrier()\n        every = range(self.handle.world_size)\n",
        "        every = range(self.handle.world_size)\n",
        SYMMETRIC,
    ),
    Fault(
        "an exchange does not wait for the reads",
        "diffulex/distributed/symmetric.py",
        "        received = torch.cat(found)\n        self.handle.barrier()\n",
        "        received = torch.cat(found)\n",
        SYMMETRIC,
    ),
    Fault(
        "places without a token keep what was there",
        "diffulex/distributed/symmetric.py",
        "            if count < capacity:\n                own[count:].zero_()\n",
        "",
        SYMMETRIC,
    ),
    Fault(
        "a rank's gradients go where its tokens went",
        "diffulex/distributed/slots.py",
        "exchange_rows(grad_RH, splits_2R, count=ctx.count, back=True, group=ctx.group)",
        "exchange_rows(grad_RH, splits_2R, count=ctx.count, back=False, group=ctx.group)",
        RANKS,
        "naive_exchange_equals",
    ),
    Fault(
        "compiled ranks without tokens leave exchanges out",
        "diffulex/distributed/exchange_ops.py",
        "    torch.fx.has_side_effect(op)\n",
        "",
        (f"{PARALLEL}/test_naive_code.py",),
        "without_tokens",
    ),
    Fault(
        "compiled ranks without tokens exchange in an order of their own",
        "lowering/graph/order_pass.py",
        '        node.kwargs = node.kwargs | {"follows": ahead}\n',
        "        pass\n",
        (f"{PARALLEL}/test_naive_code.py",),
        "keep_their_order",
    ),
    Fault(
        "gradients of what all ranks have are not added up",
        "diffulex/distributed/collectives.py",
        "        return sum_of_ranks(grad, ctx.group), None\n",
        "        return grad, None\n",
        RANKS,
        "sums_over_ranks or rounding_is",
    ),
    Fault(
        "an expert's row on another rank",
        "diffulex/moe/dispatcher/static_dispatcher.py",
        "        first = self.rank * self.most_rows + 1\n",
        "        first = self.rank * self.most_rows\n",
        RANKS,
        "static_exchange_equals",
    ),
    Fault(
        "slots come back from the next place",
        "diffulex/moe/dispatcher/static_dispatcher.py",
        "        place_N = ranks_N.clamp(min=0).long() * (self.capacity * self.plan.top_k) + slot_N\n",
        "        place_N = ranks_N.clamp(min=0).long() * self.capacity + slot_N\n",
        RANKS,
        "static_exchange_equals",
    ),
    Fault(
        "a share of experts one too long",
        "diffulex/distributed/placement.py",
        "    starts = [rank * share + min(rank, rest) for rank in range(parts + 1)]\n",
        "    starts = [rank * share + rank * (rest > 0) for rank in range(parts + 1)]\n",
        (f"{PARALLEL}/test_placement.py", f"{PARALLEL}/test_balance.py"),
    ),
    Fault(
        "a slot goes away though its expert has a copy here",
        "diffulex/distributed/placement.py",
        "turns.append((rank,) if rank in ranks else ranks[first:] + ranks[:first])",
        "turns.append(ranks[first:] + ranks[:first])",
        (f"{PARALLEL}/test_placement.py",),
    ),
    Fault(
        "all slots go to an expert's first copy",
        "diffulex/moe/dispatcher/base_dispatcher.py",
        "self.ranks_of_expert[known_TK, token_T1 % self.num_copies[known_TK]]",
        "self.ranks_of_expert[known_TK, 0 * token_T1]",
        (f"{PARALLEL}/test_placement.py",),
    ),
    Fault(
        "every rank begins with an expert's first copy",
        "diffulex/distributed/placement.py",
        "ranks[first:] + ranks[:first])",
        "ranks)",
        (f"{PARALLEL}/test_placement.py",),
    ),
    Fault(
        "slots that travel as tokens take turns as slots",
        "diffulex/moe/dispatcher/base_dispatcher.py",
        "row_T1 // self.plan.rows_per_token",
        "row_T1",
        (f"{PARALLEL}/test_placement.py",),
    ),
    Fault(
        "copies of an expert are drawn apart",
        "diffulex/moe/layer/sharded.py",
        " self.parallel.experts_of(self.num_experts).replicas.items():\n",
        " ():\n",
        RANKS,
        "copies_of_new_experts",
    ),
    Fault(
        "a failure of the time before counts as one of now",
        "diffulex/distributed/faults.py",
        "        _take_back(group)\n",
        "        pass\n",
        (f"{PARALLEL}/test_faults.py",),
        "not lost_rank",
    ),
    Fault(
        "lost ranks are named by their place in the group",
        "diffulex/distributed/faults.py",
        "', '.join(str(ranks[rank]) for rank in lost)",
        "', '.join(str(rank) for rank in lost)",
        (f"{PARALLEL}/test_faults.py",),
        "not lost_rank",
    ),
    Fault(
        "an error of a rank's own is taken for a lost rank",
        "diffulex/distributed/faults.py",
        "        if isinstance(error, MoEErrorMixin) or not _is_of_exchange(error, text):\n",
        "        if not _is_of_exchange(error, text):\n",
        (f"{PARALLEL}/test_faults.py",),
        "not lost_rank",
    ),
    Fault(
        "shares of replicas are not divided",
        "diffulex/distributed/balance.py",
        "            heapq.heappush(heap, (-loads[expert] / (count + 1), count + 1, expert))\n",
        "            heapq.heappush(heap, (-loads[expert], count + 1, expert))\n",
        (f"{PARALLEL}/test_balance.py",),
    ),
    Fault(
        "up rows are loaded as gate rows",
        "diffulex/checkpoint/rules.py",
        "        return separate(piece, interleaved=interleaved)[PARTS.index(rule.part)], stored\n",
        "        return separate(piece, interleaved=interleaved)[0], stored\n",
        ("tests/diffulex/checkpoint/test_rules.py",),
    ),
    Fault(
        "the router's logits are computed under autocast",
        "diffulex/moe/layer/gate.py",
        "    if torch.is_autocast_enabled(device.type):\n",
        "    if False:\n",
        (f"{MOE}/test_layer.py",),
        "autocast or logits",
    ),
    # the table of claimed figures
    Fault(
        "a test that a process died in counts for nothing",
        "tests/reliability/results.py",
        '("begun", "begun and not ended"), ',
        "",
        ("tests/reliability/test_reliability.py",),
        "report",
    ),
)
