"""The whole way in three minutes on two cores: train, sparsify, export, measure, report.

Trains a small network on real handwritten digits, dense and with three of every four weights
removed by LBC; exports both and checks the files' outputs; times them side by side in every engine
that is installed; prints one table, and writes runs/quickstart/report.html.
"""

from __future__ import annotations

from tenfold.measure import table
from tenfold.report import write_report
from tenfold.tasks.run import train
from tenfold.tasks.verbs import bench_run, export_run

DENSE, SPARSE = "runs/quickstart-dense", "runs/quickstart"
COMMAND = "make quickstart"


def main() -> None:
    print("1/4  train the dense network")
    dense = train("digits-dense", run_dir=DENSE, overwrite=True, command=COMMAND)
    print("2/4  train it with LBC: 1 of every 4 weights is kept")
    sparse = train(
        "digits-lbc",
        run_dir=SPARSE,
        overwrite=True,
        overrides={"baseline": DENSE},
        command=COMMAND,
    )
    print("3/4  export both, and run the files in ONNX Runtime and OpenVINO")
    for run in (DENSE, SPARSE):
        result = export_run(run)
        worst = max(check.max_difference for check in result.checks)
        print(f"{result.path}: outputs equal within {worst:.1e} in {len(result.checks)} checks")
    print("4/4  time them side by side on this machine")
    print(table(bench_run(SPARSE, batch_sizes=(1, 16), command=COMMAND)))
    assert dense is not None
    assert sparse is not None
    print(f"report: {write_report(sparse.path)}")


if __name__ == "__main__":
    main()
