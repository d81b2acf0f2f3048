"""The verbs that come after training, on a run's folder: export, bench, predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.data import create, load_clip, load_image, normalize
from tenfold.deploy import artifact
from tenfold.deploy.onnx import ExportResult, export
from tenfold.deploy.shadow_export import export_remover
from tenfold.errors import UserError
from tenfold.measure import BenchResult, bench, measure_cells
from tenfold.measure.cells import write_cells
from tenfold.nn.generators import Generator
from tenfold.nn.supervit import SuperViT
from tenfold.tasks.cells import cell_at
from tenfold.tasks.folder import RunFolder, write_json
from tenfold.tasks.loading import (
    example_of,
    finished_run,
    fresh_network,
    metadata_of,
    model_of,
    open_artifact,
    refuse_synthesizer,
)
from tenfold.tasks.removal_verbs import compared_removers, remover_example
from tenfold.tasks.shadow_verbs import (
    ShadowRemoved,
    is_shadow_removal,
    open_exported,
    remove_shadows,
)
from tenfold.tasks.translation_verbs import (
    PREDICTIONS,
    Translated,
    compared_models,
    is_translation,
    translate_files,
)

__all__ = ["Prediction", "bench_run", "export_run", "predict"]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one file: names and probabilities, best first."""

    file: str
    classes: list[str]
    probabilities: list[float]


def export_run(path: str | Path, to: str = "onnx") -> ExportResult:
    """Export a run's model into `RUN/export/`, and note its checks in `export.json`.

    Args:
        path: the run, or an artifact (then the file lies in `export/` beside `model.json`).
        to: onnx, openvino or torch.

    Raises:
        UserError: see `tenfold.export`.
    """
    folder, found = open_artifact(path)
    refuse_synthesizer(found)
    target = folder.export
    model = model_of(folder, found)
    if is_shadow_removal(found.preprocessing):
        result = export_remover(model, target, to, metadata_of(found))
    else:
        result = export(
            model,
            target,
            example_of(found),
            to=to,
            metadata=metadata_of(found),
            dynamic_size=model.multiple if isinstance(model, Generator) else None,
        )
    notes = target / "export.json"
    known: list[dict[str, Any]] = []
    if notes.is_file():
        import json

        known = json.loads(notes.read_text(encoding="utf-8")).get("exports", [])
    entry = {**result.to_dict(), "path": result.path.name}
    write_json(notes, {"exports": [*(e for e in known if e.get("format") != to), entry]})
    return result


def bench_run(
    path: str | Path,
    *,
    baseline: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 16),
    runtimes: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 2.0,
    command: str | None = None,
) -> BenchResult:
    """Time a run's model against the dense one, and write `RUN/bench.json`.

    Args:
        path: a finished run.
        baseline: the run that stands as "before"; by default the recipe's, else the network as it
            is built before any method.
        batch_sizes: images at a time.
        runtimes: some of pytorch, torch.compile, onnxruntime, openvino, tenfold; all by default.
        threads: for every runtime.
        seconds: for one runtime at one batch size.
        command: what the user typed, for the record.

    Raises:
        UserError: no finished run, or an argument that `tenfold.bench` refuses.
    """
    run = finished_run(path)
    recipe, found = run.recipe(), artifact.read(run.model)
    refuse_synthesizer(found)
    model = model_of(run, found)
    label = str(run.facts().get("label") or "model")
    compared: dict[str, nn.Module] = {}
    accuracy: dict[str, float] = {}
    packed: dict[str, int] = {}
    onnx: dict[str, Path] = {}
    before = baseline or recipe.baseline
    removes = recipe.task == "shadow_removal"
    if before is None and recipe.task == "translation":
        compared |= compared_models(run, found)
    elif before is None and removes:
        compared |= compared_removers(run, recipe)
    elif before is not None:
        dense = finished_run(before)
        dense_artifact = artifact.read(dense.model)
        compared["dense"] = model_of(dense, dense_artifact)
        _note(dense, "dense", accuracy, packed, onnx)
    elif recipe.methods:
        data = create(recipe.data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            compared["dense"] = fresh_network(recipe, data)
    if label in compared:
        label = f"{label} ({recipe.name})"
    compared[label] = model
    _note(run, label, accuracy, packed, onnx)
    if isinstance(model, SuperViT):
        # With all tokens it costs what the plain network does; here is what it can save at once.
        size, rate = model.sizes[-1], model.keep_rates[0]
        pruned = f"{label}, {rate:g} kept"
        compared[pruned] = model.cell(size, rate)
        known = [row for row in model.table.rows if (row.size, row.keep_rate) == (size, rate)]
        if known[0].accuracy is not None:
            accuracy[pruned] = known[0].accuracy
    result = bench(
        compared,
        remover_example(found) if removes else example_of(found),
        batch_sizes=batch_sizes,
        threads=threads,
        runtimes=runtimes,
        seconds=seconds,
        accuracy=accuracy,
        packed_bytes=packed,
        onnx=onnx,
        command=command,
        seed=recipe.seed,
    )
    write_json(
        run.path / "bench.json",
        {**result.to_dict(), "baseline": None if before is None else str(before)},
    )
    if isinstance(model, SuperViT):
        measure_cells(
            model,
            example_of(found),
            batch=max(batch_sizes),
            threads=threads,
            seconds=seconds * len(model.cells) / 2,
        )
        write_cells(run.model, model.table)
    return result


def predict(
    path: str | Path,
    files: Sequence[str | Path],
    *,
    top: int = 3,
    model: nn.Module | None = None,
    budget: str | None = None,
    out: str | Path | None = None,
    tile: int | None = None,
    overwrite: bool = False,
    mask: str | Path | None = None,
    auto_mask: bool = False,
    detector: str | Path | Callable[[Any], Any] | None = None,
    background: str | None = None,
    skip_bad: bool = False,
) -> list[Prediction] | list[Translated] | list[ShadowRemoved]:
    """Classify image files; or clips, where the network was trained on clips.

    A network that translates images, or removes shadows, writes what it makes of photos of any size
    into a folder.

    Args:
        path: a run or an artifact; or the exported file of a network that removes shadows.
        files: images, brought upright and to the network's size and channels; or video files and
            folders of frames, of which the middle is taken.
        top: classes to name.
        model: a fresh network, where the artifact names none.
        budget: of a SuperViT: `5ms`, `1.2gmacs` or `300img/s`; its most accurate cell within that.
        out: folder of the photos that are written; `RUN/predictions` by default.
        tile: side of the tiles of large photos that are translated.
        overwrite: replace photos that are there.
        mask: where the shadow is: a file, or a folder of files with the photos' names.
        auto_mask: guess where it is, which often fails.
        detector: find it; see `tenfold.deploy.shadow_detector.open_detector`.
        background: white, black or #rrggbb, behind transparent photos with shadows.
        skip_bad: leave out photos with shadows that can't be read, and masks.

    Raises:
        UserError: no artifact, a budget below the cheapest cell, or a file that can't be read; the
            file is named.
    """
    if not files:
        raise UserError("predict needs at least one file")
    shadows: dict[str, Any] = {
        "mask": mask,
        "auto_mask": auto_mask,
        "detector": detector,
        "background": background,
        "skip_bad": skip_bad,
    }
    exported = open_exported(path)
    if exported is not None:
        _refuse({"budget": budget, "tile": tile, "model": model}, "a network that removes shadows")
        target = Path(path).parent / PREDICTIONS if out is None else Path(out)
        return remove_shadows(*exported, files, target, overwrite=overwrite, **shadows)
    folder, found = open_artifact(path)
    refuse_synthesizer(found)
    if found.preprocessing is None:
        raise UserError(
            f"{found.path} doesn't say how its input is prepared: save it with preprocessing=…"
        )
    network = found.model(model) if model is not None else model_of(folder, found)
    if is_shadow_removal(found.preprocessing):
        _refuse({"budget": budget, "tile": tile}, "a network that removes shadows")
        target = folder.path / PREDICTIONS if out is None else Path(out)
        facts = found.preprocessing
        return remove_shadows(network, facts, files, target, overwrite=overwrite, **shadows)
    _refuse(shadows, "a network that removes no shadows")
    if is_translation(found.recipe):
        if budget is not None:
            raise UserError("a budget is for a SuperViT: leave it out")
        target = folder.path / PREDICTIONS if out is None else Path(out)
        return translate_files(network, files, target, tile=tile, overwrite=overwrite)
    if out is not None or tile is not None:
        raise UserError("out and tile are for networks that translate images: leave them out")
    if budget is not None:
        network = cell_at(network, budget)
    results = []
    read = load_image if found.preprocessing.get("frames") is None else load_clip
    for file in files:
        image = read(file, found.preprocessing)
        with torch.inference_mode():
            logits: Tensor = network(normalize(image.unsqueeze(0), found.preprocessing))
        best = logits.softmax(dim=1)[0].topk(min(top, logits.shape[1]))
        names = found.classes or [str(index) for index in range(logits.shape[1])]
        results.append(
            Prediction(str(file), [names[i] for i in best.indices.tolist()], best.values.tolist())
        )
    return results


def _refuse(options: dict[str, Any], network: str) -> None:
    given = [name for name, value in options.items() if value not in (None, False)]
    if given:
        raise UserError(f"{' and '.join(given)}: not for {network}; leave it out")


def _note(
    run: RunFolder,
    label: str,
    accuracy: dict[str, float],
    packed: dict[str, int],
    onnx: dict[str, Path],
) -> None:
    evaluation = run.facts().get("evaluation") or {}
    if "accuracy" in evaluation:
        accuracy[label] = float(evaluation["accuracy"])
    packed[label] = artifact.artifact_bytes(run.model)
    file = run.export / "model.onnx"
    if file.is_file() and file.stat().st_mtime >= (run.model / "model.json").stat().st_mtime:
        onnx[label] = file
