"""Count what freezing saves: updates, and the backward work that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Savings"]


class Savings:
    """Counts over the iterations of a run, those of the warm-up included.

    Args:
        parameters: all that are trained: weights, biases, norms and bounds.

    Attributes:
        frozen: frozen weights by layer, those that a mask has removed not counted.
        updates: mean share of the parameters that are frozen: the paper's "updates saved".

    >>> savings = Savings(100)
    >>> for count in (0, 10, 30):
    ...     savings.frozen["conv"] = count
    ...     savings.count({"conv": (1, 100)})
    >>> round(savings.updates, 4), round(savings.backward, 4)
    (0.1333, 0.0667)
    """

    def __init__(self, parameters: int):
        self.parameters = parameters
        self.frozen: dict[str, int] = {}
        self.iterations = 0
        self._updates = 0.0
        self._products = 0.0

    def count(self, layers: Mapping[str, tuple[int, int]]) -> None:
        """Count one iteration; `layers` has multiply-adds and number of weights by name."""
        self.iterations += 1
        self._updates += self._share()
        macs = sum(work for work, _ in layers.values())
        saved = sum(
            work * self.frozen.get(name, 0) / numel for name, (work, numel) in layers.items()
        )
        self._products += saved / macs if macs else 0.0

    def _share(self) -> float:
        return sum(self.frozen.values()) / max(1, self.parameters)

    @property
    def updates(self) -> float:
        """Mean share of the parameters that were frozen."""
        return self._updates / max(1, self.iterations)

    @property
    def backward(self) -> float:
        """Counted share of the backward work: half of the updates, as the paper counts.

        The backward pass is two products of equal cost, and the weights' gradient is one of them.
        """
        return self.updates / 2

    @property
    def backward_by_work(self) -> float:
        """The same, each layer weighted by its multiply-adds: sum F f / (2 sum F)."""
        return self._products / max(1, self.iterations) / 2

    def metrics(self) -> dict[str, float]:
        """Return the share that is frozen now, and what has been saved up to now."""
        return {
            "frozen": self._share(),
            "updates_saved": self.updates,
            "backward_saved": self.backward_by_work,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "frozen": dict(self.frozen),
            "iterations": self.iterations,
            "updates": self._updates,
            "products": self._products,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self.frozen = dict(state["frozen"])
        self.iterations = int(state["iterations"])
        self._updates = float(state["updates"])
        self._products = float(state["products"])
