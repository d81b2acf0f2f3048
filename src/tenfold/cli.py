"""The command line: `tenfold VERB …`. The same verbs exist in Python, for any nn.Module."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tenfold.cli_parser import Handler, build_parser
from tenfold.errors import UserError, nearest, unknown_name

if TYPE_CHECKING:
    from tenfold.deploy.cells import CellsExport
    from tenfold.nn.budget import CellTable

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after `tenfold`; by default the process's.

    Returns:
        0 when done, 2 for a mistake in what was given, 130 when interrupted.
    """
    given = words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = _parser()
        words, overrides = _split_overrides(words)
        options, rest = parser.parse_known_args(words)
        rest += overrides
        options.command = shlex.join(["tenfold", *given])
        handler: Handler = options.handler
        if rest and not options.takes_overrides:
            flag = rest[0].partition("=")[0]
            known = [name for action in options.parser._actions for name in action.option_strings]
            raise UserError(f"{options.verb} has no {flag}: {nearest(flag, known)}")
        handler(options, rest)
    except UserError as error:
        print(f"tenfold: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; the last epoch's checkpoint is kept, and the same command with --resume goes on"
        print(f"tenfold: interrupted{kept if given[:1] == ['train'] else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tenfold list | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(
            f"tenfold:{where}: {error.strerror}; make room or choose another folder, and go on "
            "with --resume where a run was under way",
            file=sys.stderr,
        )
        return 2
    return 0


def _split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Set a recipe's keys (`--train.epochs 5`) apart from the options of `train` and `plan`."""
    if words[:1] not in (["train"], ["plan"]) or {"-h", "--help"} & set(words):
        return words, []
    options, overrides, rest = [words[0]], [], words[1:]
    takes_value = {"--run_dir": True, "--resume": False, "--overwrite": False, "--no_bench": False}
    while rest:
        word = rest.pop(0)
        flag = word.partition("=")[0]
        if not word.startswith("--") or flag in takes_value:
            options.append(word)
            if takes_value.get(word) and rest:
                options.append(rest.pop(0))
            continue
        if "." not in flag:
            _check_key(flag, takes_value if words[0] == "train" else {})
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return options, overrides


def _check_key(flag: str, options: Iterable[str]) -> None:
    import dataclasses

    from tenfold.tasks.recipe import Recipe

    known = [f"--{field.name}" for field in dataclasses.fields(Recipe)]
    if flag not in known:
        raise unknown_name("option", flag, [*options, *known])


# -- verbs ---------------------------------------------------------------------------------------


def _list(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold import data, methods
    from tenfold.nn import models
    from tenfold.tasks.recipe import shipped

    described = {key: _first_line(method.__doc__) for key, method in methods.registry().items()}
    sections = {
        "methods": described,
        "models": models.names(),
        "data": data.names(),
        "augmentations": data.translation_augmentations()
        | data.shadow_augmentations()
        | data.augmentations(),
        "recipes": shipped(),
    }
    chosen = [options.what] if options.what else list(sections)
    width = max(len(name) for section in chosen for name in sections[section]) + 2
    for section in chosen:
        print(section)
        for name, text in sections[section].items():
            print(f"  {name:<{width}}{text}")
        print()


def _doctor(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.measure import doctor, render

    print(render(doctor()))


def _plan(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.tasks.recipe import load_recipe, parse_overrides
    from tenfold.tasks.run import check_trainer, plan

    overrides = parse_overrides(rest)
    check_trainer(load_recipe(options.recipe, overrides).trainer)
    print(plan(options.recipe, overrides=overrides))


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.tasks.recipe import parse_overrides
    from tenfold.tasks.run import train
    from tenfold.tasks.synthesis_run import SynthesisRun
    from tenfold.tasks.verbs import bench_run

    run = train(
        options.recipe,
        run_dir=options.run_dir,
        resume=options.resume,
        overwrite=options.overwrite,
        overrides=parse_overrides(rest),
        command=options.command,
    )
    if run is None:  # not the first rank
        return
    print(run.evaluation)
    # What paints shadows is used once, to make data: nothing is compared with it.
    if not options.no_bench and not isinstance(run, SynthesisRun):
        print("measuring before and after on this machine …", flush=True)
        # torch.compile takes minutes to compile a large network: `tenfold bench` has it
        runtimes = ("pytorch", "onnxruntime", "openvino", "tenfold")
        command = f"tenfold bench {shlex.quote(str(run.path))}"
        result = bench_run(run.path, runtimes=runtimes, seconds=1.0, command=command)
        _print_bench(result)
        _print_known_cells(str(run.path))
    _write_report(str(run.path))


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.tasks.cells import export_run_cell, export_run_cells, parse_cell
    from tenfold.tasks.verbs import export_run

    if options.cells:
        _export_cells(export_run_cells, options)
        return
    if options.cell is not None:
        result = export_run_cell(options.run, parse_cell(options.cell), options.to)
    else:
        result = export_run(options.run, options.to)
    print(f"{result.path}  {result.bytes:,} bytes, {len(result.folded)} batch norms folded")
    for check in result.checks:
        print(
            f"  {check.runtime}, batch {check.batch}: outputs equal within "
            f"{check.max_difference:.1e}"
        )


def _export_cells(export: Callable[[str], CellsExport], options: argparse.Namespace) -> None:
    if options.to != "onnx" or options.cell is not None:
        raise UserError("--cells writes all cells as onnx: leave --to and --cell out")
    written = export(options.run)
    share = written.bytes / written.separate_bytes
    print(
        f"{written.path}  {len(written.files)} cells on one file of weights, {written.bytes:,} "
        f"bytes, {share:.0%} of what they take separately"
    )
    for cell, name in written.files.items():
        worst = max(check.max_difference for check in written.checks[cell])
        print(f"  {name}: outputs equal within {worst:.1e}")


def _evaluate(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.tasks.evaluation import evaluate

    if options.cells:
        from tenfold.tasks.cells import evaluate_run_cells

        if options.to is not None:
            raise UserError("--cells evaluates in PyTorch: leave --to out")
        _print_cells(evaluate_run_cells(options.model, options.data, options.batch_size))
        return
    print(evaluate(options.model, options.data, to=options.to, batch_size=options.batch_size))


def _evaluate_shadows(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.tasks import shadow_evaluation

    if options.json is not None:
        shadow_evaluation.check_json(options.json, options.overwrite)
    found = shadow_evaluation.evaluate_shadows(
        options.results,
        options.ground_truth,
        options.masks,
        input=options.input,
        size=shadow_evaluation.parse_size(options.size),
        mask_above=options.mask_above,
        dilate=options.dilate,
        skip_unmatched=options.skip_unmatched,
        skip_bad=options.skip_bad,
    )
    if options.json is not None:
        shadow_evaluation.write_json(
            found, options.json, command=options.command, overwrite=options.overwrite
        )
    print(found)  # its last lines are the table


def _synthesize(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.tasks.synthesis_verbs import synthesize_files

    print(
        synthesize_files(
            options.run,
            options.images,
            options.masks,
            options.out,
            seed=options.seed,
            split=options.split,
            largest=options.largest,
            overwrite=options.overwrite,
            skip_bad=options.skip_bad,
            skip_unmatched=options.skip_unmatched,
        )
    )


def _bench(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.tasks.verbs import bench_run

    result = bench_run(
        options.run,
        baseline=options.baseline,
        batch_sizes=options.batch,
        runtimes=options.runtime,
        threads=options.threads,
        seconds=options.seconds,
        command=options.command,
    )
    _print_bench(result)
    _print_known_cells(options.run)


def _print_known_cells(run: str) -> None:
    """Print the cells of a SuperViT, where a run has them."""
    from pathlib import Path

    from tenfold.measure.cells import read_cells
    from tenfold.nn.budget import CellTable

    found = read_cells(Path(run) / "model")
    if found is not None:
        print()
        _print_cells(CellTable.from_dict(found))


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    _write_report(options.run, options.output)


def _predict(options: argparse.Namespace, rest: list[str]) -> None:
    from tenfold.tasks.shadow_verbs import ShadowRemoved
    from tenfold.tasks.translation_verbs import Translated
    from tenfold.tasks.verbs import predict

    predictions = predict(
        options.run,
        options.files,
        top=options.top,
        budget=options.budget,
        out=options.out,
        tile=options.tile,
        overwrite=options.overwrite,
        mask=options.mask,
        auto_mask=options.auto_mask,
        detector=options.detector,
        background=options.background,
        skip_bad=options.skip_bad,
    )
    width = max(len(prediction.file) for prediction in predictions)
    for found in predictions:
        if isinstance(found, Translated):
            print(f"{found.file:<{width}}  {found.output}")
            continue
        if isinstance(found, ShadowRemoved):
            print(f"{found.file:<{width}}  {found.output or 'skipped'}  mask: {found.mask or '-'}")
            for note in found.notes:
                print(f"{'':<{width}}  {note}")
            continue
        shown = ", ".join(
            f"{name} {probability:.1%}"
            for name, probability in zip(found.classes, found.probabilities, strict=True)
        )
        print(f"{found.file:<{width}}  {shown}")


def _print_cells(table: CellTable) -> None:
    from tenfold.measure.cells import cell_lines

    measured = any(row.latency_ms is not None for row in table.rows)
    front = table.front("latency_ms" if measured else "macs")
    print("\n".join(cell_lines(table.rows, front)))
    print("* no other cell is both as accurate and as cheap")


def _print_bench(result: object) -> None:
    from tenfold.measure import BenchResult, table

    assert isinstance(result, BenchResult)
    print(table(result))
    plans = result.plans.get(result.models[-1], {})
    if plans and any(layer["pattern"] for layer in next(iter(plans.values()))["layers"]):
        from tenfold.deploy.plan import OptimizePlan

        batch, plan = next(iter(plans.items()))
        print(f"\n{result.models[-1]} in the runtime tenfold, batch {batch}, layer by layer:\n")
        print(OptimizePlan.from_dict(plan))


def _write_report(run: str, output: str | None = None) -> None:
    from pathlib import Path

    from tenfold.report import write_report

    written = write_report(Path(run), None if output is None else Path(output))
    print(f"report: {written}")


def _parser() -> argparse.ArgumentParser:
    return build_parser(
        {
            "list": _list,
            "doctor": _doctor,
            "plan": _plan,
            "train": _train,
            "export": _export,
            "evaluate": _evaluate,
            "evaluate-shadows": _evaluate_shadows,
            "synthesize": _synthesize,
            "bench": _bench,
            "report": _report,
            "predict": _predict,
        }
    )


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if text else ""


if __name__ == "__main__":
    sys.exit(main())
