# SPDX-License-Identifier: Apache-2.0
"""What encodes images beside the steps, as the runner sees it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """What became of an image that was asked for.

    Attributes:
        identifier: of the image in vLLM's caches.
        features: ``(num_features, feature_width)`` in the encoder's dtype; None if it failed.
        fault: why it failed, the end of a sentence that begins with the image: ``could not be
            encoded: …``; None if it is encoded.
    """

    identifier: str
    features: torch.Tensor | None
    fault: str | None = None


class EncodeQueue(Protocol):
    """Encodes images in the order in which they are asked for, while steps go on.

    Called by the worker, in each step in the order of the methods below, by one thread.
    """

    def cancel(self, identifiers: Iterable[str]) -> None:
        """Forget images that nobody wants any more; :meth:`advance` does not return them.

        An identifier that is cancelled may be submitted again, in the same step too.
        """

    def submit(self, images: "Sequence[MultiModalFeatureSpec]") -> None:
        """Ask for images, none of which is asked for already, behind those that are.

        An image is told from another one by its identifier as long as it is asked for; one that was
        cancelled may have been another image.
        """

    def advance(self, *, idle: bool) -> list[EncodedImage]:
        """Go on with the encoding; returns the images that are done, each once, in any order.

        Whatever goes wrong with an image is its fault, and no other's.

        Args:
            idle: whether the step has nothing else to do. A queue that encodes elsewhere then waits
                for an image to be done, for some tens of milliseconds at most.
        """

    def close(self) -> None:
        """Drop everything, and end what was started for it."""
