"""What the command line takes: verbs, their arguments and their help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

from tenfold.errors import UserError, nearest

__all__ = ["Handler", "Parser", "build_parser"]

Handler = Callable[[argparse.Namespace, list[str]], None]


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what was wrong as a `UserError`, with the nearest right name."""
        if "invalid choice" in message:
            given = message.split("'")[1]
            known = [
                choice
                for action in self._actions
                for choice in (action.choices or ())
                if given not in (action.choices or ())
            ]
            message = f"unknown {given!r}: {nearest(given, known)}"
        raise UserError(f"{message} (tenfold --help lists the commands)")


def build_parser(handlers: Mapping[str, Handler]) -> argparse.ArgumentParser:
    """Return the parser of all verbs.

    Args:
        handlers: what runs a verb, by its name.
    """
    from tenfold import __version__

    parser = Parser(
        prog="tenfold",
        description="Make vision models cheaper to train and to run, and measure what was saved.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tenfold {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="verb")

    def verb(name: str, text: str, overrides: bool = False) -> Parser:
        made: Parser = verbs.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(handler=handlers[name], takes_overrides=overrides, parser=made)
        return made

    listing = verb("list", "List methods, models, data, augmentations and recipes.")
    what = ("methods", "models", "data", "augmentations", "recipes")
    listing.add_argument("what", nargs="?", choices=what, help="one section only")

    verb("doctor", "Say what this machine can profit from.")

    planning = verb("plan", "Say what a recipe will do to every layer; train nothing.", True)
    _recipe_arguments(planning)

    training = verb("train", "Train a recipe to its end, save and measure the model.", True)
    _recipe_arguments(training)
    training.add_argument("--run_dir", metavar="PATH", help="the run's folder (runs/<name>)")
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    training.add_argument("--overwrite", action="store_true", help="throw the old run away")
    training.add_argument("--no_bench", action="store_true", help="don't measure at the end")

    exporting = verb("export", "Export a run's model into RUN/export/ and check it there.")
    exporting.add_argument("run", metavar="RUN", help="a run's folder, or an artifact")
    exporting.add_argument("--to", choices=("onnx", "openvino", "torch"), default="onnx")
    exporting.add_argument(
        "--cell", metavar="SIZE,RATE", help="one cell of a SuperViT, such as 192,0.7"
    )
    exporting.add_argument(
        "--cells", action="store_true", help="all of them, on one file of weights"
    )

    evaluating = verb("evaluate", "Evaluate a run, an artifact or an exported file.")
    evaluating.add_argument("model", metavar="RUN|ARTIFACT|ONNX")
    evaluating.add_argument(
        "--data", metavar="NAME", help="another data set than it was trained on"
    )
    evaluating.add_argument("--to", choices=("onnx", "openvino"), help="evaluate the exported form")
    evaluating.add_argument("--cells", action="store_true", help="every cell of a SuperViT")
    evaluating.add_argument("--batch_size", type=_positive, help="256 images or 32 clips")

    shadows = verb("evaluate-shadows", "Evaluate photos whose shadows any method removed.")
    shadows.add_argument("results", metavar="RESULTS", help="folder of the results")
    shadows.add_argument("ground_truth", metavar="GROUND_TRUTH", help="of the shadow-free photos")
    shadows.add_argument("masks", metavar="MASKS", help="of the shadow masks")
    shadows.add_argument("--input", metavar="FOLDER", help="shadow photos, to give their own error")
    shadows.add_argument("--size", default="256", help="a side, HEIGHTxWIDTH, or native")
    shadows.add_argument(
        "--mask_above", type=float, default=0.0, metavar="SHARE", help="of white: 0 or 0.5"
    )
    shadows.add_argument("--dilate", type=int, default=0, metavar="PIXELS", help="grow the masks")
    shadows.add_argument(
        "--skip_unmatched", "--skip-unmatched", action="store_true", help="files without partners"
    )
    shadows.add_argument("--skip_bad", action="store_true", help="photos that can't be read")
    shadows.add_argument("--json", metavar="FILE", help="write all figures, each photo's too")
    shadows.add_argument("--overwrite", action="store_true", help="replace that file")

    painting = verb("synthesize", "Paint shadows into photos, for triplets to train on.")
    painting.add_argument("run", metavar="RUN", help="of the task shadow_synthesis")
    painting.add_argument("images", metavar="IMAGES", help="folder of photos with shadows")
    painting.add_argument("--masks", metavar="FOLDER", required=True, help="of their masks")
    painting.add_argument("--out", metavar="FOLDER", required=True, help="of the triplets")
    painting.add_argument("--seed", type=_from_zero, default=0, help="of the shadows' shapes")
    painting.add_argument("--split", choices=("train", "test"), default="train")
    painting.add_argument(
        "--largest", type=_positive, default=640, metavar="PIXELS", help="longer side of results"
    )
    painting.add_argument("--overwrite", action="store_true", help="replace files that are there")
    painting.add_argument("--skip_bad", action="store_true", help="files that can't be used")
    painting.add_argument(
        "--skip_unmatched", "--skip-unmatched", action="store_true", help="files without partners"
    )

    timing = verb("bench", "Time a run's model against the dense one, side by side.")
    timing.add_argument("run", metavar="RUN")
    timing.add_argument("--baseline", metavar="RUN", help='the run that stands as "before"')
    timing.add_argument("--batch", type=_positive, nargs="+", default=[1, 16], metavar="SIZE")
    timing.add_argument("--runtime", nargs="+", metavar="NAME", help="some of the runtimes")
    timing.add_argument("--threads", type=_positive, help="for every runtime")
    timing.add_argument("--seconds", type=_seconds, default=2.0, help="a runtime and batch size")

    reporting = verb("report", "Write a run's report, one HTML page.")
    reporting.add_argument("run", metavar="RUN")
    reporting.add_argument("--output", metavar="FILE", help="RUN/report.html by default")

    predicting = verb(
        "predict", "Classify images or clips, translate photos, or remove their shadows."
    )
    predicting.add_argument(
        "run",
        metavar="RUN",
        help="a run's folder, an artifact, or a shadow remover's exported file",
    )
    predicting.add_argument("files", nargs="+", metavar="FILE")
    predicting.add_argument(
        "--budget", metavar="BUDGET", help="of a SuperViT: 5ms, 1.2gmacs or 300img/s"
    )
    predicting.add_argument("--top", type=_positive, default=3, help="classes to name")
    predicting.add_argument(
        "--out", metavar="FOLDER", help="photos that are made (RUN/predictions)"
    )
    predicting.add_argument(
        "--tile", type=_positive, metavar="PIXELS", help="translate large photos in tiles"
    )
    predicting.add_argument(
        "--overwrite", action="store_true", help="replace photos that are there"
    )
    predicting.add_argument(
        "--mask",
        metavar="FILE",
        help="white in shadow; or a folder of masks with the photos' names",
    )
    predicting.add_argument(
        "--auto_mask", action="store_true", help="guess the mask: what is dark; often fails"
    )
    predicting.add_argument(
        "--detector", metavar="NAME", help="of shadows: .onnx, file.py:function or a command"
    )
    predicting.add_argument(
        "--background", metavar="COLOUR", help="of transparent photos: white, black, #rrggbb"
    )
    predicting.add_argument(
        "--skip_bad", action="store_true", help="photos and masks that can't be read"
    )
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped name or a YAML file")
    if {"--help", "-h"} & set(sys.argv):
        from tenfold.tasks.recipe import keys_help

        parser.epilog = keys_help()


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return value


def _from_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, more than 0")
    return value
