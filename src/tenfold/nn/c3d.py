"""C3D: eight 3x3x3 convolutions and three linear layers (Tran et al., ICCV 2015).

The network of "Learning Spatiotemporal Features with 3D Convolutional Networks", figure 3: every
convolution has stride 1 and padding 1, the first pooling leaves time alone, the last is padded in
space so that 7 becomes 4. At 16x112x112 that is 38.5 G multiply-adds, nearly all of them in layers
that Winograd's transforms apply to.

What is added to it, all off by default: another width, batch norm, smaller linear layers. A shorter
or smaller clip than the original's is pooled only along the axes that still have more than one
position.
"""

from __future__ import annotations

from torch import Tensor, nn

from tenfold.errors import UserError

__all__ = ["C3D"]

# Channels of each convolution in units of `width`, by the stage whose end is a pooling.
_STAGES = ((1,), (2,), (4, 4), (8, 8), (8, 8))


class C3D(nn.Module):
    """Eight 3x3x3 convolutions for clips of 16 x 112 x 112; 38.5 G MACs.

    Args:
        num_classes: outputs.
        channels: input channels.
        frames: of a clip.
        size: (H, W) of a frame.
        width: channels of the first convolution; 64 in the paper.
        hidden: outputs of the two hidden linear layers; 4,096 in the paper.
        dropout: after each of them.
        batch_norm: behind every convolution; the paper has none.

    Raises:
        UserError: a number below 1, or a dropout outside 0..1.

    >>> import torch
    >>> C3D(10, frames=8, size=(32, 32), width=4, hidden=8)(torch.zeros(2, 3, 8, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 487,
        channels: int = 3,
        frames: int = 16,
        size: tuple[int, int] = (112, 112),
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
        batch_norm: bool = False,
    ):
        super().__init__()
        shape: tuple[int, ...] = (frames, *size)
        for name, value in (("frames and size", min(shape)), ("width", width), ("hidden", hidden)):
            if value < 1:
                raise UserError(f"{name}={value}: expected at least 1")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout={dropout}: expected 0 or more, and less than 1")
        stages = []
        for stage, multiples in enumerate(_STAGES):
            layers: list[nn.Module] = []
            for multiple in multiples:
                layers += _convolution(channels, multiple * width, batch_norm)
                channels = multiple * width
            pooling, shape = _pooling(shape, stage)
            stages.append(nn.Sequential(*layers, pooling))
        self.features = nn.Sequential(*stages)
        positions = shape[0] * shape[1] * shape[2]
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * positions, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, clip: Tensor) -> Tensor:
        """Map clips `(B, C, T, H, W)` to logits `(B, num_classes)`."""
        logits: Tensor = self.classifier(self.features(clip))
        return logits


def _convolution(inputs: int, outputs: int, batch_norm: bool) -> list[nn.Module]:
    convolution = nn.Conv3d(inputs, outputs, 3, padding=1, bias=not batch_norm)
    return [convolution, *([nn.BatchNorm3d(outputs)] if batch_norm else []), nn.ReLU()]


def _pooling(shape: tuple[int, ...], stage: int) -> tuple[nn.MaxPool3d, tuple[int, ...]]:
    """Return a stage's pooling by 2, and the shape behind it."""
    last = stage == len(_STAGES) - 1
    window, padding, behind = [], [], []
    for axis, length in enumerate(shape):
        by = 1 if length == 1 or (stage == 0 and axis == 0) else 2
        # The last pooling loses no row or column of an odd size: 7 becomes 4.
        pad = int(last and axis > 0 and by == 2 and length % 2)
        window.append(by)
        padding.append(pad)
        behind.append((length + 2 * pad - by) // by + 1)
    depth, height, width = window
    kernel = (depth, height, width)
    return nn.MaxPool3d(kernel, kernel, (padding[0], padding[1], padding[2])), tuple(behind)
