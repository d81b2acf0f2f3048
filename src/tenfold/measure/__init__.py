"""Measure what compression brings: cost, latency side by side, and what this machine can do."""

from tenfold.measure.bench import bench
from tenfold.measure.cells import measure_cells
from tenfold.measure.cost import Cost, LayerCost, count_cost
from tenfold.measure.machine import Advice, Machine, advice, doctor, render
from tenfold.measure.result import BenchResult, LatencyRow, SizeRow, Skipped
from tenfold.measure.runners import OnnxModel, OpenVinoModel
from tenfold.measure.table import table

__all__ = [
    "Advice",
    "BenchResult",
    "Cost",
    "LatencyRow",
    "LayerCost",
    "Machine",
    "OnnxModel",
    "OpenVinoModel",
    "SizeRow",
    "Skipped",
    "advice",
    "bench",
    "count_cost",
    "doctor",
    "measure_cells",
    "render",
    "table",
]
