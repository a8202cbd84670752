# SPDX-License-Identifier: Apache-2.0
"""Spyre's geometry: blocks, chunks and the padding that aligns them. Pure arithmetic.

A prompt occupies whole blocks and is prefilled in chunks of whole blocks. The grid of chunks is
anchored at the *end* of the prompt: whole padding blocks stand before the prompt so that its last
block is the last block of a chunk, and the rest of the last block is padding too::

    padded:   | pad pad t0 | t1 t2 t3 | t4 t5 t6.. |      t: a block of real tokens
    chunks:   |  chunk 0   |  chunk 1 |  chunk 2   |

Positions below are counted in real tokens unless they are called *padded*.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_spyre_mm.config import SpyreSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


CARD_CONTEXT_LEN = 3072
"""The context length beside the powers of two, in tokens, that the card is known to run."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Block and chunk sizes that the scheduler and the runner share.

    Attributes:
        block_size: tokens in a KV cache block.
        chunk_size: tokens in a prefill chunk, a multiple of ``block_size``.
        max_batch_tkv: bound on batch × padded length of a decode step, in tokens.
        whole_chunks: whether a prefill starts at a chunk of the grid, as the card's static graph
            requires. A CPU, which computes no padding, starts at any block.
    """

    block_size: int
    chunk_size: int
    max_batch_tkv: int
    whole_chunks: bool = True

    def __post_init__(self) -> None:
        if self.chunk_size <= 0 or self.chunk_size % self.block_size:
            raise ValueError(
                f"the chunk size must be a multiple of {self.block_size}, got {self.chunk_size} "
                "(it is vLLM's --max-num-batched-tokens)"
            )

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def left_padding(self, num_tokens: int) -> int:
        """Padding tokens before a prompt of ``num_tokens`` tokens; a multiple of the block size."""
        padded = self.num_blocks(num_tokens) * self.block_size
        return -padded % self.chunk_size

    def padded_length(self, num_tokens: int) -> int:
        """Length of a prompt of ``num_tokens`` tokens with its padding to whole chunks."""
        return -(-num_tokens // self.chunk_size) * self.chunk_size

    def context_len(self, max_model_len: int) -> int:
        """Tokens that a sequence of ``max_model_len`` tokens may occupy with its padding.

        For a card the least length that its compiler has programs for: a power of two or 3072, in
        whole chunks.

        Raises:
            ValueError: there is no such length.
        """
        if not self.whole_chunks:
            return self.padded_length(max_model_len)
        power = 1 << (max(max_model_len, self.chunk_size) - 1).bit_length()
        for length in sorted((CARD_CONTEXT_LEN, power)):
            if length >= max_model_len and length % self.chunk_size == 0:
                return length
        raise ValueError(
            f"the card has programs for contexts of {CARD_CONTEXT_LEN} tokens or a power of two, "
            f"in whole chunks, and none of {max_model_len} tokens or more has whole chunks of "
            f"{self.chunk_size}: make --max-num-batched-tokens a power of two"
        )

    def chunk_end(self, num_tokens: int, start: int) -> int:
        """End of the chunk that contains token ``start`` of a prompt of ``num_tokens`` tokens."""
        padding = self.left_padding(num_tokens)
        padded_end = ((start + padding) // self.chunk_size + 1) * self.chunk_size
        return min(num_tokens, padded_end - padding)

    def prefill_start(self, num_tokens: int, num_cached: int) -> int:
        """First token to compute of a prompt with ``num_cached`` tokens in the prefix cache.

        The last token is always computed, for its logits.
        """
        usable = min(num_cached, num_tokens - 1)
        if not self.whole_chunks:
            return usable // self.block_size * self.block_size
        padding = self.left_padding(num_tokens)
        return max(0, (usable + padding) // self.chunk_size * self.chunk_size - padding)

    def decode_rows_that_fit(self, lengths: list[int]) -> list[int]:
        """Rows of a decode step that respect the bound on batch × padded length.

        Args:
            lengths: tokens of each sequence after the step, the oldest request first.

        Returns:
            Indices into ``lengths``, ascending. The first is always among them (one sequence
            fits by construction), so the oldest request makes progress.
        """
        if not lengths:
            return []
        if len(lengths) * self.num_blocks(max(lengths)) * self.block_size <= self.max_batch_tkv:
            return [*range(len(lengths))]
        chosen: list[int] = []
        longest = 0
        for row, length in enumerate(lengths):
            candidate = max(longest, self.num_blocks(length) * self.block_size)
            if chosen and (len(chosen) + 1) * candidate > self.max_batch_tkv:
                continue
            chosen.append(row)
            longest = candidate
        return chosen


def geometry_of(vllm_config: "VllmConfig") -> Geometry:
    """The geometry of a resolved configuration."""
    settings = SpyreSettings.from_vllm_config(vllm_config)
    assert settings.max_batch_tkv is not None, "resolved at start"
    return Geometry(
        block_size=vllm_config.cache_config.block_size,
        chunk_size=vllm_config.scheduler_config.max_num_batched_tokens,
        max_batch_tkv=settings.max_batch_tkv,
        whole_chunks=settings.backend == "sendnn",
    )
