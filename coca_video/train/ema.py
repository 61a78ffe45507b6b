"""The exponential moving average of the trainable weights, which is evaluated and saved in place of the latest ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """The average of `parameters` (name and parameter), started at what they are now; DTensors are averaged by shard.

    The decay at update t (from 0) is min(decay, (1 + t) / (10 + t)): the initial weights weigh 1/10 after the first
    update and fade fast, where a constant 0.9999 would keep 90% of them after 1,000 updates. Only parameters are
    averaged; buffers, such as a batch norm's running statistics, stay the latest.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], *, decay: float) -> None:
        names_and_parameters = list(parameters)
        self.decay = decay
        self._parameters: list[Tensor] = [parameter.detach() for _, parameter in names_and_parameters]
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in names_and_parameters
        }
        """The averages by name: what a checkpoint keeps. Restored in place."""

    def decay_at(self, step: int) -> float:
        """The decay at update `step` (from 0)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Draws the averages towards the weights that update `step` (from 0) has just made."""
        pairs = list(zip(self.averages.values(), self._parameters, strict=True))
        # A foreach kernel takes tensors of one kind, and where weights are sharded some are not.
        for sharded in (True, False):
            of_kind = [pair for pair in pairs if isinstance(pair[0], DTensor) == sharded]
            if of_kind:
                averages, parameters = zip(*of_kind, strict=True)
                torch._foreach_lerp_(averages, parameters, weight=1 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages inside, and its own weights again afterwards, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def keep(self) -> None:
        """Leaves the averages in the model for good."""
        for parameter, average in zip(self._parameters, self.averages.values(), strict=True):
            parameter.copy_(average)  # the foreach form does not know DTensors

    @torch.no_grad()
    def _swap(self) -> None:
        # One at a time: the copy beside the two is then of one parameter, not of the whole model.
        for parameter, average in zip(self._parameters, self.averages.values(), strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)
