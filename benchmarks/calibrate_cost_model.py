"""Fit the cost model's constants to sweeps, and say how far its choices are from the best measured ones.

    python -m benchmarks.calibrate_cost_model sweep.csv            # report
    python -m benchmarks.calibrate_cost_model sweep.csv --fit      # search constants and print them

A cell is one (shape, stage, tokens); its regret is the time of the schedule that `gemm_time` alone would pick over the
best measured. Plans go by `cost_model.score`, which adds what a sweep of GEMMs alone does not show.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import math
import random

import numpy as np
import sympy

from diffulex.benching.shapes import case_of_shape
from diffulex.tuning.cells import Cell as TunedCell
from diffulex.tuning.search import schedule_of_row
from lowering.schedule import cost_model
from lowering.schedule.device import H200
from lowering.schedule.plan import candidates
from lowering.schedule.schedule import Schedule

Cell = tuple[str, str, int, str]  # shape, stage, tokens, file: times of one file were taken side by side


def load(paths: list[str]) -> dict[Cell, tuple[np.ndarray, np.ndarray, list[Schedule]]]:
    """Cells -> (arguments of the model, one column each [argument, schedule]; measured seconds [schedule], fp64).

    Without schedules that a plan would not consider.
    """
    rows: dict[Cell, dict[Schedule, float]] = collections.defaultdict(dict)
    for path in paths:
        with open(path) as file:
            for row in csv.DictReader(file):
                cell = row["shape"], row["stage"], int(row["tokens"]), path
                rows[cell].setdefault(schedule_of_row(row), float(row["us"]) * 1e-6)
    cells = {}
    for cell, times in rows.items():
        name, stage, tokens, _ = cell
        timed = TunedCell(case_of_shape(name), stage, tokens)
        shape, count = timed.gemm, timed.rows
        allowed = {dataclasses.replace(schedule, group_m=0) for schedule in candidates(shape, H200)}
        schedules = [schedule for schedule in times if dataclasses.replace(schedule, group_m=0) in allowed]
        values = [cost_model.arguments(count, shape, schedule=schedule, device=H200) for schedule in schedules]
        measured = np.array([times[schedule] for schedule in schedules])
        cells[cell] = np.array(values, dtype=float).T, measured, schedules
    return cells


def score(cells: dict, function: object, constants: dict[str, float]) -> tuple[float, dict[Cell, tuple[float, int]]]:
    """(objective, per cell (regret - 1, index picked))."""
    regrets, errors, picks = [], [], {}
    for cell, (arguments, measured, _) in cells.items():
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
    objective, picks = score(cells, function, constants)
    if arguments.fit:
        generator = random.Random(0)
        for _ in range(arguments.rounds):
            trial = dict(constants)
            for name in generator.sample(list(trial), generator.choice((1, 2, 3))):
                trial[name] *= math.exp(generator.gauss(0, 0.15))
            trial["memory_efficiency"] = min(0.95, trial["memory_efficiency"])
            value, trial_picks = score(cells, function, trial)
            if value < objective:
                objective, constants, picks = value, trial, trial_picks
        for name, value in constants.items():
            print(f'    "{name}": {value:.3g},')
    for cell, (regret, pick) in picks.items():
        _, measured, schedules = cells[cell]
        best, picked = schedules[int(measured.argmin())], schedules[pick]
        print(f"{cell!s:30} {measured.min() * 1e6:8.1f} us {best!s:36} picked {picked!s:36} +{regret * 100:.1f} %")
    print(f"mean regret {np.mean([r for r, _ in picks.values()]) * 100:.1f} %, objective {objective:.4f}")


if __name__ == "__main__":
    main()
