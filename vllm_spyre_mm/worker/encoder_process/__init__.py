# SPDX-License-Identifier: Apache-2.0
"""The vision encoder in a process of its own, beside a worker whose steps run on a card.

``python -m vllm_spyre_mm.worker.encoder_process`` is that process (:mod:`.child`). The worker
starts it and ends it (:mod:`.parent`), and hands pictures to it (:mod:`.queue`). What they say to
each other (:mod:`.messages`) goes over one pair of sockets (:mod:`.channel`).
"""
