# SPDX-License-Identifier: Apache-2.0
"""Texts of the card's software that are public, as this project reads them, and what helps."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublicError:
    """A text that the card's compiler or runtime is known to write.

    Attributes:
        text: a part of what is written.
        meaning: what it probably says.
        cure: what to do.
    """

    text: str
    meaning: str
    cure: str


_FEWER_BLOCKS = (
    "give the KV cache fewer blocks with --num-gpu-blocks-override, and lower --max-num-seqs or "
    "--max-model-len with it"
)

PUBLIC_ERRORS = (
    PublicError(
        "Need to find a valid memory space for KV cache",
        "the KV cache does not fit into the card's memory beside the weights",
        _FEWER_BLOCKS,
    ),
    PublicError(
        "Must find space in DDR",
        "the card's memory does not hold the weights, the KV cache and the programs",
        f"{_FEWER_BLOCKS}, or take more cards with --tensor-parallel-size",
    ),
    PublicError(
        "No matching compiler iter found",
        "there is no program for a size that was asked for",
        "take --max-model-len from the table of known configurations, or a power of two, and "
        "--max-num-batched-tokens 512",
    ),
    PublicError(
        "Unable to map graph within architecture constraints",
        "the compiler cannot place the graph on the card's cores",
        "lower --max-num-batched-tokens, --max-num-seqs or --max-model-len",
    ),
    PublicError(
        "Program verification failed",
        "a program, compiled or taken from the graph cache, is not as the runtime wants it",
        "empty the folder that TORCH_SENDNN_CACHE_DIR names and compile anew",
    ),
    PublicError(
        "compile_graph failed",
        "the compiler gave up; its reason stands in the lines before",
        "look for another text of this table there, else report it with those lines",
    ),
    PublicError(
        "Compilation disabled",
        "DISABLE_COMPILATION is set, and the graph cache does not hold this graph",
        "unset DISABLE_COMPILATION, or point TORCH_SENDNN_CACHE_DIR to a cache that was made with "
        "these limits",
    ),
    PublicError(
        "DDR init retried",
        "the card's memory did not come up at once",
        "nothing if the start goes on, else start the container anew, and then reset the card",
    ),
    PublicError(
        "VFIO device busy",
        "another process holds the card",
        "end it, or take another card with AIU_WORLD_RANK_0",
    ),
)


def cure_of(message: str) -> str | None:
    """What helps against an error with this message, None where nothing is known of it."""
    return next((each.cure for each in PUBLIC_ERRORS if each.text in message), None)
