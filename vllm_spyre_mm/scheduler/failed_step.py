# SPDX-License-Identifier: Apache-2.0
"""What is taken back of a step whose request failed."""

from typing import TYPE_CHECKING

from vllm_spyre_mm.scheduler.outputs import FailedEncoding

if TYPE_CHECKING:
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
    from vllm.v1.core.kv_cache_manager import KVCacheManager


def undo_failed_step(
    failed: FailedEncoding, blocks: "KVCacheManager", images: "EncoderCacheManager"
) -> None:
    """Remove from vLLM's caches the entries of a step whose request failed, and is gone.

    vLLM offers blocks to other prompts once they are allocated, and images to other requests once
    they are scheduled; these were never computed. No other request has used them, because no other
    step was scheduled since.
    """
    blocks.evict_blocks(set(failed.block_ids))
    for identifier in set(failed.identifiers):
        forget_image(images, identifier)


def forget_image(images: "EncoderCacheManager", identifier: str) -> None:
    """Remove from vLLM's books an image that is not encoded and that no request refers to.

    The worker may have its features from before: vLLM does not tell it of an image that was evicted
    and asked for anew within a step.
    """
    del images.cached[identifier], images.num_embeds_by_hash[identifier]
    images.num_free_slots += images.freeable.pop(identifier)
    images.freed.append(identifier)
