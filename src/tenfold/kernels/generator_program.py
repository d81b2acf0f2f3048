"""A generator's program: what its one kernel computes, and the order of the weights.

A program is integers, the fields of a `Step` for each convolution, one after the other. All weights
lie in one tensor, see `pack_weight`.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from torch import Tensor

from tenfold.errors import UserError

__all__ = [
    "IMAGE", "MAPS", "NOTHING", "Activation", "Norm", "Op", "Step", "as_program", "macs",
    "pack_bias", "pack_weight", "sizes", "steps_of", "unpack_weight", "weights_needed",
]  # fmt: skip

IMAGE = -1  # in place of a map: the network's input, or its result
NOTHING = -1
MAPS = 4
TILE, SMALL_TILE = 8, 4


class Op(enum.IntEnum):
    """Kinds of convolution."""

    CONVOLUTION = 0  # stride 1, 3x3 or 7x7, borders reflected
    DOWN = 1  # 3x3, stride 2, zeros around
    UP = 2  # transposed 3x3, stride 2, padding 1, output padding 1
    DEPTHWISE = 3  # 3x3, borders reflected
    POINTWISE = 4


class Norm(enum.IntEnum):
    """What normalises the map that a step reads."""

    NONE = 0
    INSTANCE = 1  # each channel of each image by its own mean and variance
    GIVEN = 2  # scales and shifts that lie in the weights


class Activation(enum.IntEnum):
    """What follows the norm."""

    NONE = 0
    RELU = 1
    CLAMP = 2  # to [-1, 1]


@dataclass(frozen=True)
class Step:
    """One convolution, and what is made of the map that it reads.

    The map is normalised, activated and added to another one, in this order. A pointwise step only
    normalises.

    Attributes:
        op: kind of convolution.
        channels: of the input.
        outputs: channels of the result.
        kernel: its side.
        reads: number of the map, or IMAGE; always what the step before wrote.
        writes: number of the map, or IMAGE, after whose hyperbolic tangent the program ends.
        norm: of the map that it reads.
        activation: after the norm.
        add: number of the map that is added, or NOTHING.
        keep: number of the map in which the sum is kept, or NOTHING.
        weight: where its weight begins.
        bias: where its bias begins, or NOTHING.
        norms: where given scales, and behind them shifts, begin, or NOTHING.
        measured: the next step's norm is an instance norm.
    """

    op: Op
    channels: int
    outputs: int
    kernel: int
    reads: int
    writes: int
    norm: Norm = Norm.NONE
    activation: Activation = Activation.NONE
    add: int = NOTHING
    keep: int = NOTHING
    weight: int = 0
    bias: int = NOTHING
    norms: int = NOTHING
    measured: bool = False

    @property
    def weights(self) -> int:
        """Return how many numbers its packed weight has."""
        taps = self.channels * self.kernel**2
        return taps if self.op == Op.DEPTHWISE else taps * padded(self.outputs)


FIELDS = 14


def tile_of(outputs: int) -> int:
    """Return how many outputs have their weights side by side."""
    return TILE if outputs > SMALL_TILE else SMALL_TILE


def padded(outputs: int) -> int:
    """Return a number of outputs filled up to whole tiles."""
    tile = tile_of(outputs)
    return -(-outputs // tile) * tile


def pack_weight(op: Op, weight: Tensor) -> Tensor:
    """Return a weight in the order of the kernels, one-dimensional.

    That is (tile of outputs, channel, row, column, output of the tile), filled up with zeros. Of a
    transposed convolution rows and columns come in the order 1, 0, 2 and 1, 2, 0: first the one
    that even rows take, then those of the odd ones. A depthwise weight stays as it is.

    Args:
        op: kind of convolution.
        weight: `(O, C, k, k)`, or `(C, O, 3, 3)` of a transposed one.
    """
    if op == Op.DEPTHWISE:
        return weight.reshape(-1)
    if op == Op.UP:
        weight = weight.transpose(0, 1)[:, :, [1, 2, 0]][..., [1, 0, 2]]
    outputs, tile = len(weight), tile_of(len(weight))
    filled = weight.new_zeros(padded(outputs), *weight.shape[1:])
    filled[:outputs] = weight
    tiles = filled.reshape(-1, tile, *weight.shape[1:])
    return tiles.movedim(1, -1).reshape(-1)


def unpack_weight(step: Step, weights: Tensor) -> Tensor:
    """Undo `pack_weight`, in a program's weights."""
    flat = weights[step.weight : step.weight + step.weights]
    if step.op == Op.DEPTHWISE:
        return flat.reshape(step.channels, 1, 3, 3)
    tile, side = tile_of(step.outputs), step.kernel
    weight = flat.reshape(-1, step.channels, side, side, tile).movedim(-1, 1).flatten(0, 1)
    weight = weight[: step.outputs]
    if step.op == Op.UP:
        weight = weight[:, :, [2, 0, 1]][..., [1, 0, 2]].transpose(0, 1)
    return weight


def pack_bias(bias: Tensor) -> Tensor:
    """Return a bias filled up with zeros to whole tiles."""
    filled = bias.new_zeros(padded(len(bias)))
    filled[: len(bias)] = bias
    return filled


def steps_of(program: Sequence[int]) -> list[Step]:
    """Return the steps of a program, checked.

    Raises:
        UserError: integers that are no program.
    """
    return list(_steps(tuple(program)))


@functools.lru_cache(maxsize=64)
def _steps(program: tuple[int, ...]) -> tuple[Step, ...]:
    if len(program) % FIELDS or not program:
        raise UserError(f"a generator's program has {len(program)} numbers: expected {FIELDS} each")
    steps: list[Step] = []
    level = 0  # how often the map was halved
    held: dict[int, tuple[int, int]] = {}  # channels and level of what maps hold
    for at in range(0, len(program), FIELDS):
        fields = program[at : at + FIELDS]
        try:
            op, norm, activation = Op(fields[0]), Norm(fields[6]), Activation(fields[7])
        except ValueError as error:
            raise UserError(f"step {len(steps)} of a generator's program: {error}") from error
        channels, outputs, kernel, reads, writes = fields[1:6]
        add, keep, weight, bias, norms, measured = fields[8:]
        step = Step(
            op, channels, outputs, kernel, reads, writes, norm, activation, add, keep, weight, bias,
            norms, bool(measured),
        )  # fmt: skip
        wrong = _wrong(step, steps[-1] if steps else None, at + FIELDS == len(program))
        if step.add != NOTHING and held.get(step.add) != (channels, level):
            wrong = wrong or f"map {step.add} doesn't hold what it adds"
        if step.keep != NOTHING:
            held[step.keep] = channels, level
        level += {Op.DOWN: 1, Op.UP: -1}.get(op, 0)
        held[step.writes] = outputs, level
        if level < 0:
            wrong = wrong or "a map becomes larger than the image"
        if wrong:
            raise UserError(f"step {len(steps)} of a generator's program: {wrong}")
        steps.append(step)
    if level:
        raise UserError("a generator's program ends at another size than it begins with")
    return tuple(steps)


def _wrong(step: Step, before: Step | None, last: bool) -> str | None:
    """Say what is wrong with a step: the kernel checks nothing."""
    kernels = {
        Op.CONVOLUTION: (3, 7), Op.DOWN: (3,), Op.UP: (3,), Op.DEPTHWISE: (3,), Op.POINTWISE: (1,)
    }  # fmt: skip
    maps = {step.add, step.keep} - {NOTHING}
    if step.channels < 1 or step.outputs < 1 or step.kernel not in kernels[step.op]:
        return f"{step.channels} channels, {step.outputs} outputs, kernel {step.kernel}"
    if step.op == Op.DEPTHWISE and step.channels != step.outputs:
        return "a depthwise convolution has as many outputs as channels"
    if step.reads != (IMAGE if before is None else before.writes) or (step.writes == IMAGE) != last:
        return f"it reads {step.reads} and writes {step.writes}"
    if before is not None and step.channels != before.outputs:
        return f"{step.channels} channels after {before.outputs} outputs"
    if not all(0 <= each < MAPS for each in (*maps, *{step.writes, step.reads} - {IMAGE})):
        return f"maps go from 0 to {MAPS - 1}"
    if len({step.reads, step.writes, *maps}) != 2 + len(maps) - (
        step.reads == step.writes == IMAGE
    ):
        return "it writes a map that it reads"
    if (step.norm == Norm.INSTANCE) != (before is not None and before.measured):
        return "instance norms and measured maps go together"
    if last and (step.measured or step.op in (Op.UP, Op.DEPTHWISE)):
        return "the last one is a convolution, and isn't measured"
    if min(step.weight, step.bias + 1, step.norms + 1) < 0 or (
        (step.norm == Norm.GIVEN) != (step.norms != NOTHING)
    ):
        return f"weights at {step.weight}, {step.bias} and {step.norms}"
    plain = step.activation == Activation.NONE and not maps and before is not None
    if step.op == Op.POINTWISE and not plain:
        return "a pointwise convolution only normalises"
    if (step.op == Op.DOWN and maps) or (step.op == Op.UP and step.keep != NOTHING):
        return "a convolution that changes the size keeps nothing, and adds nothing on the way down"
    return None


def as_program(steps: Sequence[Step]) -> tuple[int, ...]:
    """Return the fields of all steps."""
    return tuple(int(field) for step in steps for field in astuple(step))


def weights_needed(program: Sequence[int]) -> int:
    """Return how many weights a program reads at least.

    Raises:
        UserError: integers that are no program.
    """
    ends = [0]
    for step in _steps(tuple(program)):
        ends.append(step.weight + step.weights)
        ends.append(step.bias + padded(step.outputs) if step.bias != NOTHING else 0)
        ends.append(step.norms + 2 * step.channels if step.norms != NOTHING else 0)
    return max(ends)


def sizes(program: Sequence[int], height: int, width: int) -> list[tuple[int, int]]:
    """Return height and width of what each step writes.

    Raises:
        UserError: sides that the program doesn't take.
    """
    found = []
    size = height, width
    for step in _steps(tuple(program)):
        # Reflected borders need a larger map, and strides even sides.
        border = step.kernel // 2 if step.op in (Op.CONVOLUTION, Op.DEPTHWISE) else 0
        if min(size) <= border or (step.op == Op.DOWN and (size[0] % 2 or size[1] % 2)):
            raise UserError(
                f"a generator got images of {height}x{width}: expected sides that halve evenly "
                "and stay larger than the borders that are reflected"
            )
        if step.op == Op.DOWN:
            size = size[0] // 2, size[1] // 2
        elif step.op == Op.UP:
            size = 2 * size[0], 2 * size[1]
        found.append(size)
    return found


def macs(program: Sequence[int], height: int, width: int) -> int:
    """Return the multiply-adds behind one image, those with zeros of padding included.

    A transposed convolution has as many as its input has pixels, times its weights.
    """
    total, before = 0, height * width
    for step, (rows, columns) in zip(
        _steps(tuple(program)), sizes(program, height, width), strict=True
    ):
        pixels = before if step.op == Op.UP else rows * columns
        outputs = 1 if step.op == Op.DEPTHWISE else step.outputs
        total += pixels * outputs * step.channels * step.kernel**2
        before = rows * columns
    return total
