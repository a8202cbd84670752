# SPDX-License-Identifier: Apache-2.0
"""The interface of a mapping: all that the platform knows about an architecture.

A mapping is pure: it is made from the model's configuration, reads no environment, and does not
modify its arguments. The runner and the loader know no model by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_spyre_mm.model_executor.pieces import Pieces, whole
from vllm_spyre_mm.model_executor.spec import FmsModel, KVCacheOptions, LoadOverrides
from vllm_spyre_mm.multimodal.feature_layout import FeatureLayout
from vllm_spyre_mm.multimodal.merge import merge_embeddings, merge_levels

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


class UnsupportedModelError(ValueError):
    """No mapping serves this model."""


class MMUtils(ABC):
    """The mapping of one architecture, multimodal or text-only.

    Args:
        hf_config: the Transformers configuration of the whole model; :meth:`why_not` has accepted
            it.
    """

    config_classes: ClassVar[tuple[str, ...]]
    """Configuration classes it may serve, as ``library.ClassName``."""

    summary: ClassVar[str]
    """What it serves, in a few words for error messages and tables."""

    takes_embeddings: ClassVar[bool] = True
    """Whether vLLM's processor makes the placeholder of an image that is given as features."""

    def __init__(self, hf_config: Any) -> None:
        self.hf_config = hf_config

    @classmethod
    @abstractmethod
    def why_not(cls, hf_config: Any) -> str | None:
        """Why this class does not serve a configuration, or None if it does.

        Every property that the implementation would not honour exactly is a reason.
        """

    @property
    @abstractmethod
    def text_config(self) -> Any:
        """The decoder's Transformers configuration."""

    @property
    def encoder_head_dim(self) -> int | None:
        """Width of a head of the vision encoder; None without an encoder."""
        return None

    @property
    def encoder_batch_values(self) -> int:
        """Pixel values that make a pass of the encoder as fast as it gets.

        Images of several requests are encoded together up to as many. 0 where a pass has one image,
        so that waiting for others would gain nothing.
        """
        return 0

    @property
    def encoder_summary(self) -> str | None:
        """The vision encoder as it is built, in a few words; None without an encoder."""
        return None

    @property
    @abstractmethod
    def image_token_id(self) -> int | None:
        """Token id that stands for one image feature in a prompt; None if the model takes none."""

    @property
    def feature_token_ids(self) -> Mapping[str, int]:
        """The token id that stands for one feature in a prompt, for each modality that is taken.

        Modalities have vLLM's names: ``image``, ``video``.
        """
        return {} if self.image_token_id is None else {"image": self.image_token_id}

    @property
    def modalities(self) -> tuple[str, ...]:
        """vLLM's names of the modalities that the model takes beside text."""
        return tuple(self.feature_token_ids)

    @property
    def embedding_modalities(self) -> tuple[str, ...]:
        """The modalities of which vLLM's processor lays out items that are given as features."""
        return self.modalities if self.takes_embeddings else ()

    @property
    def feature_levels(self) -> int:
        """Levels of deepstack, which a feature has beside what replaces a text embedding."""
        return 0

    @property
    def feature_width(self) -> int:
        """Elements of a feature: ``hidden_size`` for the input, and for each level, in order."""
        return self.text_config.hidden_size * (1 + self.feature_levels)

    @abstractmethod
    def kv_cache_options(self, for_card: bool = False) -> KVCacheOptions:
        """Shape of the KV cache; see :meth:`load_overrides` for ``for_card``.

        Raises:
            UnsupportedModelError: the heads cannot be padded to the width that the card wants.
        """

    @abstractmethod
    def load_overrides(self, for_card: bool = False) -> LoadOverrides:
        """How to load a checkpoint.

        Args:
            for_card: build the decoder as the card's compiler requires: heads padded from 64 to
                128, and separate projections. On a CPU the padding would double the attention's
                work, and fused projections are faster.
        """

    @abstractmethod
    def warmup_image_sizes(self) -> list[tuple[int, int]]:
        """``(width, height)`` of pictures whose shapes cover every encoder graph."""

    def warmup_processor_kwargs(self) -> dict[str, Any]:
        """``mm_processor_kwargs`` of one more picture, of the last size, before the others.

        The encoder's graph takes any number of tiles if it is made of several. A processor may make
        one of every picture where a request does not ask for more, as these kwargs do. If they are
        empty there is no such picture.
        """
        return {}

    def compute_features(self, model: FmsModel, mm_kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Encode images at once; see :meth:`feature_pieces`."""
        return whole(self.feature_pieces(model, mm_kwargs))

    @abstractmethod
    def feature_pieces(
        self, model: FmsModel, mm_kwargs: Mapping[str, Any]
    ) -> Pieces[list[torch.Tensor]]:
        """Encode images in pieces: yields after each layer of the encoder.

        Args:
            model: the FMS model.
            mm_kwargs: the output of vLLM's processor, batched over the images.

        Returns:
            For each image ``(num_features, feature_width)`` in the encoder's dtype, in the order in
            which its placeholder takes them.
        """

    @abstractmethod
    def feature_layout(self, mm_kwargs: Mapping[str, Any]) -> FeatureLayout | None:
        """Which place of the image each of its features stands for.

        Args:
            mm_kwargs: the output of vLLM's processor for one image, not batched: a mapping from
                names to elements whose ``data`` is the value.

        Returns:
            The layout, or None for an image that was given as an embedding without its grid.
        """

    def positions(
        self, token_ids: list[int], mm_features: "Sequence[MultiModalFeatureSpec]"
    ) -> tuple[torch.Tensor, int] | None:
        """Positions of a prompt, for a decoder that has them on three axes.

        Args:
            token_ids: of the prompt, placeholders expanded.
            mm_features: its items in prompt order, at least one: without any, all axes are the
                tokens' indices.

        Returns:
            int64 ``(3, len(token_ids))``, and what is to be added to the index of a token behind
            the prompt, for its position on every axis; None if positions have one axis.
        """
        return None

    def tile_grid(self, mm_kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
        """Rows and columns of the tiles of one image besides its base tile; None for no tiles.

        Args:
            mm_kwargs: as in :meth:`feature_layout`.
        """
        return None

    @abstractmethod
    def embed_tokens(self, model: FmsModel, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up text embeddings, as the decoder takes them.

        Args:
            model: the FMS model.
            token_ids: int64 ``(batch, length)``.

        Returns:
            ``(batch, length, hidden_size)`` in the decoder's dtype.
        """

    def merge(
        self, text: torch.Tensor, features: torch.Tensor, feature_index: torch.Tensor
    ) -> torch.Tensor:
        """Replace text embeddings by the input's columns of features.

        Args and result: as for :func:`merge_embeddings`, but that features may have levels and
        another dtype.
        """
        columns = features[:, : text.shape[-1]]
        return merge_embeddings(text, columns.to(text.dtype), feature_index)

    def merge_levels(
        self, text: torch.Tensor, features: torch.Tensor, feature_index: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Put the levels of features at their positions; see :func:`merge_levels`."""
        if not self.feature_levels:
            return ()
        columns = features[:, text.shape[-1] :]
        return merge_levels(text, columns.to(text.dtype), feature_index)
