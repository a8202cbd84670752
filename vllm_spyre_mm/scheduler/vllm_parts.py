# SPDX-License-Identifier: Apache-2.0
"""What is overridden, read and set of vLLM's scheduler and its parts."""

from typing import TYPE_CHECKING

from vllm_spyre_mm.upstream.contract import require_attributes, require_overridable
from vllm_spyre_mm.upstream.releases import PREFIX_CACHE_HIT

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


def check_methods(overriding: "type[Scheduler]") -> None:
    """Check that vLLM's scheduler has what its subclass overrides, as that expects it.

    Raises:
        UnsupportedVllmError: names what is missing or differs.
    """
    base = overriding.__mro__[1]
    require_overridable(base, overriding._ec_transfer_pending)
    require_overridable(base, overriding._get_local_prefix_cache_hit, 4, PREFIX_CACHE_HIT)
    require_overridable(base, overriding._reserve_prefill_lookahead)
    require_overridable(base, overriding._try_schedule_encoder_inputs, returned=5)
    require_overridable(base, overriding.reset_encoder_cache)
    require_overridable(base, overriding.schedule)
    require_overridable(base, overriding.update_from_output)
    require_attributes(base, ("_preempt_request", "make_stats"))


def check_parts(scheduler: "Scheduler") -> None:
    """Check that a scheduler has the parts that are leant on.

    Raises:
        UnsupportedVllmError: names what is missing.
    """
    require_attributes(
        scheduler,
        (
            *("deferred_waiting", "ec_connector", "encoder_cache_mismatch_reqs"),
            *("max_num_active_reqs", "num_waiting_for_streaming_input", "waiting"),
        ),
    )
    require_attributes(
        type(scheduler.kv_cache_manager), ("evict_blocks", "truncate_computed_blocks")
    )
    require_attributes(
        scheduler.encoder_cache_manager,
        (
            *("cached", "freeable", "freed", "num_embeds_by_hash", "num_free_slots"),
            *("cache_size", "num_freeable_slots", "request_cached_ids"),
        ),
    )
