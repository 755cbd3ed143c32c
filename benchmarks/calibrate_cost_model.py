"""Fit the cost model's constants to sweeps, and say how far its choices are from the best measured ones.

    python -m benchmarks.calibrate_cost_model sweep.csv            # report
    python -m benchmarks.calibrate_cost_model sweep.csv --fit      # search constants and print them

A cell is one (shape, stage, tokens); its regret is the time of the schedule the model picks over the best measured.
"""

from __future__ import annotations

import argparse
import collections
import csv
import math
import random

import numpy as np
import sympy

from benchmarks.shapes import SHAPES
from lowering.schedule import cost_model
from lowering.schedule.device import H200

Cell = tuple[str, str, int]


def load(paths: list[str]) -> dict[Cell, tuple[np.ndarray, np.ndarray]]:
    """Cells -> (arguments of the model, one column each [argument, schedule]; measured seconds [schedule], fp64)."""
    rows: dict[Cell, list[tuple[list[float], float]]] = collections.defaultdict(list)
    device = H200
    for path in paths:
        with open(path) as file:
            for row in csv.DictReader(file):
                shape, stage, tokens = SHAPES[row["shape"]], row["stage"], int(row["tokens"])
                sizes = (
                    (shape.hidden, shape.intermediate, 2) if stage == "up" else (shape.intermediate, shape.hidden, 1)
                )
                schedule = [float(row[k]) for k in ("block_m", "block_n", "block_k", "num_warps", "num_stages")]
                machine = [device.num_sms, device.bandwidth, device.matrix_rate, device.shared_memory]
                arguments = [tokens * shape.top_k, shape.num_experts, *sizes, 2, *schedule, *machine]
                rows[row["shape"], stage, tokens].append((arguments, float(row["us"]) * 1e-6))
    return {
        cell: (np.array([a for a, _ in data], dtype=float).T, np.array([t for _, t in data]))
        for cell, data in rows.items()
    }


def score(cells: dict, function: object, constants: dict[str, float]) -> tuple[float, dict[Cell, tuple[float, int]]]:
    """(objective, per cell (regret - 1, index picked))."""
    regrets, errors, picks = [], [], {}
    for cell, (arguments, measured) in cells.items():
        predicted = function(*arguments, *constants.values()) * np.ones_like(measured)
        pick = int(np.argmin(predicted))
        regret = math.log(measured[pick] / measured.min())
        near = measured < 1.6 * measured.min()
        errors.append(np.abs(np.log(predicted[near] / measured[near])).mean())
        regrets.append(regret)
        picks[cell] = (math.exp(regret) - 1, pick)
    return float(np.mean(regrets) + 0.3 * max(regrets) + 0.15 * np.mean(errors)), picks


def main() -> None:
    """Report the regret of the present constants; with --fit, search better ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--rounds", type=int, default=3000)
    arguments = parser.parse_args()
    cells = load(arguments.sweeps)
    symbols = [sympy.Symbol(name, positive=True) for name in cost_model.CONSTANTS]
    inputs = (*cost_model.ARGUMENTS, *symbols)
    function = sympy.lambdify(inputs, cost_model.gemm_time(), modules="numpy", cse=True)
    constants = dict(cost_model.CONSTANTS)
    best, picks = score(cells, function, constants)
    if arguments.fit:
        generator = random.Random(0)
        for _ in range(arguments.rounds):
            trial = dict(constants)
            for name in generator.sample(list(trial), generator.choice((1, 2, 3))):
                trial[name] *= math.exp(generator.gauss(0, 0.15))
            trial["memory_efficiency"] = min(0.95, trial["memory_efficiency"])
            value, trial_picks = score(cells, function, trial)
            if value < best:
                best, constants, picks = value, trial, trial_picks
        for name, value in constants.items():
            print(f'    "{name}": {value:.3g},')
    for cell, (regret, pick) in picks.items():
        arguments_, measured = cells[cell]
        picked = (
            "x".join(f"{v:.0f}" for v in arguments_[6:9, pick])
            + f" w{arguments_[9, pick]:.0f} s{arguments_[10, pick]:.0f}"
        )
        print(f"{cell!s:30} best {measured.min() * 1e6:8.1f} us, picked {picked:22} +{regret * 100:.1f} %")
    print(f"mean regret {np.mean([r for r, _ in picks.values()]) * 100:.1f} %, objective {best:.4f}")


if __name__ == "__main__":
    main()
