# SPDX-License-Identifier: Apache-2.0
"""How many blocks the KV cache on a card has.

No call tells the free memory of a card, and the whole cache is placed on it when the graphs are
compiled: the number is what the limits need, what a known configuration says, or what a user gives.
A cache of 16 blocks was seen to fail at a batch of 3, where 15 and 18 worked.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CardCache:
    """Arithmetic of the blocks of a card's KV cache: they are a multiple of the batch.

    Attributes:
        block_size: tokens in a block.
        max_model_len: tokens of the longest sequence.
        max_num_seqs: sequences that decode together.
        max_batch_tkv: bound on batch × padded length, in tokens.
    """

    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_batch_tkv: int

    @property
    def multiple(self) -> int:
        """What divides the number of blocks: the batch that the compiler is told, two at least."""
        return max(self.max_num_seqs, 2)

    @property
    def of_one(self) -> int:
        """Blocks that the longest sequence needs, with block 0, which pads."""
        return -(-self.max_model_len // self.block_size) + 1

    @property
    def useful(self) -> int:
        """Blocks that a decode can read: a full batch's, as far as ``max_batch_tkv`` goes."""
        full_batch = self.max_num_seqs * (self.of_one - 1)
        return max(min(full_batch, self.max_batch_tkv // self.block_size) + 1, self.of_one)

    def default(self, known: int | None) -> int:
        """Blocks if the user gives none.

        Args:
            known: of the known configuration with these limits, if it says how many.
        """
        if known is not None:
            return self._rounded_down(known)
        return self.rounded_up(self.useful)

    def from_override(self, given: int) -> int:
        """What ``--num-gpu-blocks-override`` becomes.

        Raises:
            ValueError: it is less than a decode may read.
        """
        blocks = self._rounded_down(given)
        if blocks < self.useful:
            raise ValueError(
                f"--num-gpu-blocks-override {given} leaves {blocks} blocks, a multiple of "
                f"{self.multiple}, to the card's KV cache, and a decode may read {self.useful}: "
                f"give {self.rounded_up(self.useful)}, or lower --max-num-seqs, --max-model-len or "
                "max_batch_tkv"
            )
        return blocks

    def from_bytes(self, given: int, block_bytes: int) -> int:
        """What ``--kv-cache-memory-bytes`` becomes.

        Raises:
            ValueError: it does not hold one sequence.
        """
        blocks = self._rounded_down(given // block_bytes)
        if blocks < self.of_one:
            raise ValueError(
                f"--kv-cache-memory-bytes {given} leaves {blocks} blocks, a multiple of "
                f"{self.multiple}, to the card's KV cache, and the longest sequence needs "
                f"{self.of_one}: give {self.rounded_up(self.of_one) * block_bytes}, or lower "
                "--max-model-len"
            )
        return blocks

    def rounded_up(self, blocks: int) -> int:
        """The least number of blocks that a card takes and that is not less."""
        return -(-blocks // self.multiple) * self.multiple

    def _rounded_down(self, blocks: int) -> int:
        return blocks // self.multiple * self.multiple
