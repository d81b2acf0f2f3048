"""Accuracy of what turns images or clips into logits: a module, an artifact, an exported file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tenfold.data import LabelledData, TranslationData, create
from tenfold.errors import UserError
from tenfold.tasks.loading import model_of, open_artifact, refuse_synthesizer
from tenfold.tasks.translation_evaluation import TranslationEvaluation

if TYPE_CHECKING:
    from tenfold.data.shadows import ShadowData
    from tenfold.tasks.removal_evaluation import RemovalEvaluation

__all__ = ["Evaluation", "data_of", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Figures over held-out images or clips.

    Attributes:
        accuracy: share of them whose top class is right, 0 to 1.
        loss: mean cross-entropy, in nats.
        images: how many there are.
        data: name of the data set.
        runtime: pytorch, onnxruntime or openvino.
        unit: image or clip.
    """

    accuracy: float
    loss: float
    images: int
    data: str
    runtime: str
    unit: str = "image"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """Write one line for a person."""
        return (
            f"{self.data}: accuracy {100 * self.accuracy:.2f} % of {self.images:,} held-out "
            f"{self.unit}s, loss {self.loss:.4f} ({self.runtime})"
        )


def evaluate(
    model: nn.Module | str | Path,
    data: LabelledData | TranslationData | ShadowData | str | dict[str, Any] | None = None,
    *,
    to: str | None = None,
    batch_size: int | None = None,
) -> Evaluation | TranslationEvaluation | RemovalEvaluation:
    """Evaluate on the held-out images or clips of a data set.

    Of a network that translates images: by their distance to the targets, and by FID and KID where
    its recipe names an extractor. Of one that removes shadows: by the errors in the shadow, outside
    it, and over all.

    Args:
        model: a module, or the path of a run, an artifact, an `.onnx` or an OpenVINO `.xml` file.
        data: a data set or its name; by default the one that a run or file was trained on.
        to: `onnx` or `openvino`: evaluate what is exported instead. A run's own export is taken,
            anything else is exported for the occasion.
        batch_size: how many at a time; by default 256 images or 32 clips.

    Raises:
        UserError: nothing there to evaluate, no data named, or outputs that don't fit the classes.
    """
    if to not in (None, "torch", "onnx", "openvino"):
        raise UserError(f"to={to!r}: expected onnx, openvino or torch")
    translated = _translation(model, data, to)
    if translated is not None:
        return translated
    from tenfold.tasks.removal_verbs import evaluate_removal

    removed = evaluate_removal(model, data, to)  # type: ignore[arg-type]
    if removed is not None:
        return removed
    assert data is None or isinstance(data, LabelledData | str | dict)
    with _opened(model, data, to) as (runtime, forward, images):
        return _evaluate(forward, images, runtime, batch_size or images.eval_batch_size)


Forward = Callable[[Tensor], Tensor]


def _translation(
    model: nn.Module | str | Path, data: Any, to: str | None
) -> TranslationEvaluation | None:
    """Evaluate a generator; None where the model or the data is no such thing."""
    from tenfold.tasks.translation_verbs import evaluate_translation, is_translation

    if isinstance(model, nn.Module):
        if not isinstance(data, TranslationData):
            return None
        if to in (None, "torch"):
            return evaluate_translation(model, data)
        raise UserError(f"to={to!r}: export the generator, and evaluate the file")
    path = Path(model)
    if path.suffix in (".onnx", ".xml"):
        runtime, runner = _runner(path)
        recipe: dict[str, Any] = runner.metadata.get("recipe") or {}
        forward: Any = runner
    else:
        run, found = open_artifact(path)
        recipe = found.recipe or {}
        forward, runtime = None, "pytorch"
    if not is_translation(recipe):
        return None
    if forward is None:
        exported = run.export / {"onnx": "model.onnx", "openvino": "model.xml"}.get(to or "", "-")
        if exported.is_file():
            runtime, forward = _runner(exported)
        elif to in (None, "torch"):
            forward = model_of(run, found)
        else:
            raise UserError(f"{path} is not exported: run tenfold export {path} --to {to} first")
    extractor = (recipe.get("gan") or {}).get("extractor")
    return evaluate_translation(forward, data or recipe["data"], extractor, runtime)


@contextlib.contextmanager
def _opened(
    model: nn.Module | str | Path, data: Any, to: str | None
) -> Iterator[tuple[str, Forward, LabelledData]]:
    """Yield the runtime's name, a function from images to logits, and the data."""
    if isinstance(model, nn.Module):
        if data is None:
            raise UserError("evaluate needs data for a module: pass its name, such as 'digits'")
        images = data_of(data)
        yield from _module(model, images, to)
        return
    path = Path(model)
    if path.suffix in (".onnx", ".xml"):
        wanted = "onnx" if path.suffix == ".onnx" else "openvino"
        if to not in (None, wanted):
            raise UserError(f"{path} is an {wanted} file: leave --to away")
        runtime, runner = _runner(path)
        yield runtime, runner, data_of(data, runner.metadata, path)
        return
    run, found = open_artifact(path)
    refuse_synthesizer(found)
    images = data_of(data, {"recipe": found.recipe}, path)
    exported = run.export / {"onnx": "model.onnx", "openvino": "model.xml"}.get(to or "", "-")
    if exported.is_file():
        runtime, runner = _runner(exported)
        yield runtime, runner, images
        return
    yield from _module(model_of(run, found), images, to)


def _module(
    model: nn.Module, images: LabelledData, to: str | None
) -> Iterator[tuple[str, Forward, LabelledData]]:
    if to in (None, "torch"):
        yield "pytorch", _in_eval(model), images
        return
    import tempfile

    from tenfold.deploy.onnx import export

    example = torch.zeros(1, *images.shape)
    with tempfile.TemporaryDirectory() as folder:
        written = export(model, folder, example, to=str(to))
        runtime, runner = _runner(written.path)
        yield runtime, runner, images


def _in_eval(model: nn.Module) -> Forward:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def forward(image: Tensor) -> Tensor:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                logits: Tensor = model(image.to(device)).float().cpu()
        finally:
            for module, training in modes:
                module.training = training
        return logits

    return forward


def _runner(path: Path) -> tuple[str, Any]:
    from tenfold.measure import OnnxModel, OpenVinoModel

    if path.suffix == ".xml":
        return "openvino", OpenVinoModel(path)
    return "onnxruntime", OnnxModel(path)


def data_of(
    data: LabelledData | str | dict[str, Any] | None,
    known: dict[str, Any] | None = None,
    path: Path | None = None,
) -> LabelledData:
    """Return a data set, or the one that a run's recipe names.

    Raises:
        UserError: none is named.
    """
    if isinstance(data, LabelledData):
        return data
    if data is None:
        recipe = (known or {}).get("recipe") or {}
        data = recipe.get("data")
        if data is None:
            raise UserError(f"{path} doesn't say which data it was trained on: give --data NAME")
    return create(data)


def _evaluate(forward: Forward, images: LabelledData, runtime: str, batch_size: int) -> Evaluation:
    right, loss, count = 0, 0.0, 0
    for batch in images.test_loader(batch_size=batch_size):
        try:
            logits = forward(images.normalize(batch[images.key]))
        except UserError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"the model doesn't take {images.described} ({images.name}): "
                f"{str(error).splitlines()[0]}"
            ) from error
        label = batch["label"]
        if logits.ndim != 2 or logits.shape[1] != images.num_classes:
            raise UserError(
                f"the model gives outputs of shape {tuple(logits.shape)}, and {images.name} has "
                f"{images.num_classes} classes: expected (B, {images.num_classes})"
            )
        right += int((logits.argmax(dim=1) == label).sum())
        loss += float(functional.cross_entropy(logits, label, reduction="sum"))
        count += len(label)
    return Evaluation(right / count, loss / count, count, images.name, runtime, images.key)
