# SPDX-License-Identifier: Apache-2.0
"""The ranks of a tensor-parallel model, the first of which does work of the host for all.

Pictures are encoded and tokens are sampled once, not by each rank for itself: the ranks share the
host, and what is drawn at random has to be the same for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import distributed
from torch.distributed import ProcessGroup

Details = TypeVar("Details")

NO_TOKEN = -1
"""Sent in place of each token that the first rank could not sample."""


class FirstRankError(RuntimeError):
    """What the first rank does for all of them failed there, whose own error says why."""

    @classmethod
    def of(cls, error: Exception) -> Self:
        """For the other ranks, in the words of the first one's error."""
        return cls(f"the first rank, which works for all, failed: {type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a model, as one of them sees them.

    What the first rank sends, each other one has to ask for at the same place. They wait without
    taking time of the CPU.

    Attributes:
        group: of Gloo, over which the host's tensors go; None for a model of one rank.
        num_threads: threads that all ranks together may run on the host, None for as many as there
            are.
    """

    group: ProcessGroup | None = None
    num_threads: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that works for all."""
        return self.group is None or self.group.rank() == 0

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's values, written into what the others give.

        Args:
            tensor: contiguous, of the same shape and dtype on each rank.
        """
        if self.group is not None:
            source = distributed.get_global_rank(self.group, 0)
            # As bytes: Gloo does not know every dtype.
            distributed.broadcast(tensor.view(torch.uint8), source, self.group)
        return tensor

    def broadcast_object(self, value: Any = None) -> Any:
        """The first rank's value, which is pickled; the others give none."""
        if self.group is None:
            return value
        values = [value]
        distributed.broadcast_object_list(
            values, distributed.get_global_rank(self.group, 0), self.group
        )
        return values[0]

    def send_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give the others tensors, of any number and shape: the first rank alone calls this."""
        if self.group is None:
            return
        self.broadcast_object([(tensor.shape, tensor.dtype) for tensor in tensors])
        for tensor in tensors:
            self.broadcast(tensor.contiguous())

    def receive_tensors(self) -> list[torch.Tensor]:
        """What :meth:`send_tensors` gives, on the others.

        Raises:
            Exception: the one that the first rank gave to :meth:`broadcast_object` instead.
        """
        sent = self.broadcast_object()
        if isinstance(sent, Exception):
            raise sent
        return [self.broadcast(torch.empty(shape, dtype=dtype)) for shape, dtype in sent]

    def broadcast_tokens(
        self, count: int, sample: Callable[[], tuple[torch.Tensor, Details]]
    ) -> tuple[torch.Tensor, Details | None]:
        """The token ids that the first rank samples, int64 ``(count, 1)``.

        Args:
            count: of the tokens.
            sample: gives them; called on the first rank, which keeps the details to itself.

        Raises:
            FirstRankError: on the others, as soon as ``sample`` raised on the first, where its
                error goes on.
        """
        if not self.is_first:
            token_ids = self.broadcast(torch.empty(count, 1, dtype=torch.int64))
            if bool((token_ids == NO_TOKEN).any()):
                error: FirstRankError = self.broadcast_object()
                raise error
            return token_ids, None
        try:
            token_ids, details = sample()
        except Exception as error:  # the other ranks wait for it
            self.broadcast(torch.full((count, 1), NO_TOKEN, dtype=torch.int64))
            self.broadcast_object(FirstRankError.of(error))
            raise
        return self.broadcast(token_ids), details
