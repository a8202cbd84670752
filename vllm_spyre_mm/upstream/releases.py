# SPDX-License-Identifier: Apache-2.0
"""What differs between the releases of vLLM that are supported; nothing else asks for a release.

Each entry names the release that ends it: once that is older than any that is supported, the entry
goes, and its one use with it.
"""

from collections.abc import Mapping

PREFIX_CACHE_HIT = ("self, request", "self, request, max_cache_hit_length")
"""Parameters of ``Scheduler._get_local_prefix_cache_hit``: those of 0.32, and of the later ones.
Ends with 0.32: then the override names both."""

LATER_FIELDS: Mapping[str, tuple[str, ...]] = {
    "": ("watchdog_config",),
    "cache_config": ("simple_cpu_offload_num_blocks",),
}
"""Fields of vLLM's configuration that 0.32 does not have, by the path of their class; what becomes
of them is decided with the others (``frontend.flags``). Ends with 0.32."""
