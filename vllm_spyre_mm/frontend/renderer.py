# SPDX-License-Identifier: Apache-2.0
"""The platform's renderer: vLLM's, which makes prompts of chats, for chats with images.

It is registered for tokenizers of Hugging Face, without which no processor of images works.

Leans on: ``render_chat_async`` renders every chat that comes over HTTP, and takes the messages as
dicts, and ``render_cmpl_async`` every other prompt; ``render_messages`` and
``render_messages_async`` render one conversation; the renderer of an engine makes, when it is made,
the cache of processed images that its requests share; ``shutdown`` is called when a server is told
to end, before its engine is.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from vllm import envs
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.renderers.hf import HfRenderer

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.mixed_chat import (
    embeddings_among_pictures,
    read_once,
    with_loaded,
)
from vllm_spyre_mm.upstream.contract import require_methods
from vllm_spyre_mm.vllm_fixes import chat_parts, sender_cache, shutdown_errors


def check_base(base: type = HfRenderer) -> None:
    """Check that vLLM's renderer is called by what is overridden: else it would be left out.

    Raises:
        UnsupportedVllmError: a method is missing, or its parameters have other names.
    """
    require_methods(
        base,
        {
            "render_chat_async": ("conversations",),
            "render_cmpl_async": ("prompts",),
            "shutdown": (),
            "render_messages": ("messages", "params"),
            "render_messages_async": ("messages", "params"),
        },
    )


class ImageRenderer(HfRenderer):
    """Renders chats in which pictures and embeddings are mixed, and keeps clients apart."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        check_base()
        super().__init__(config, tokenizer)
        cache = self._mm_processor_cache
        if type(cache) is LruKeyReplicatedSenderCache and sender_cache.FAULT.applies():
            self._mm_processor_cache = sender_cache.SenderCache(config.model_config)

    async def render_chat_async(
        self, conversations: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Make prompts of chats that came over HTTP.

        Raises:
            VLLMValidationError: an image is named and not sent, or an embedding has faulty fields.
            GracefulHTTPError: the server was told to end (HTTP 503).
        """
        conversations = [[read_once(message) for message in chat] for chat in conversations]
        if chat_parts.FAULT.applies():
            conversations = [self._isolated(chat) for chat in conversations]
        with shutdown_errors.shutdown_answered(self, RuntimeError):
            return await super().render_chat_async(conversations, *args, **kwargs)

    async def render_cmpl_async(self, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        with shutdown_errors.shutdown_answered(self, RuntimeError):
            return await super().render_cmpl_async(prompts, *args, **kwargs)

    def shutdown(self) -> None:
        """End its threads: a request that needs one from now on is refused (HTTP 503)."""
        self.told_to_end = shutdown_errors.FAULT.applies()
        super().shutdown()

    def _isolated(self, chat: list[Any]) -> list[Any]:
        for message in chat:
            chat_parts.check_message(message)
        if SpyreSettings.from_vllm_config(self.config).trust_client_image_uuids:
            return chat
        return [chat_parts.without_uuids(message) for message in chat]

    def render_messages(self, messages: Any, params: Any) -> Any:
        messages = [read_once(message) for message in messages]
        embeddings = self._embeddings_to_load(messages)
        if embeddings:
            connector = self._connector()
            loaded = [
                None if text is None else connector.fetch_image_embedding(text)
                for text in embeddings
            ]
            messages = with_loaded(messages, loaded)
        return super().render_messages(messages, params)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        messages = [read_once(message) for message in messages]
        embeddings = self._embeddings_to_load(messages)
        if embeddings:
            load = self._connector().fetch_image_embedding_async
            texts = [text for text in embeddings if text is not None]
            loaded = iter(await asyncio.gather(*map(load, texts)))
            messages = with_loaded(
                messages, [None if text is None else next(loaded) for text in embeddings]
            )
        return await super().render_messages_async(messages, params)

    def _embeddings_to_load(self, messages: list[Any]) -> list[Any]:
        multimodal = self.model_config.multimodal_config
        if multimodal is None or not multimodal.enable_mm_embeds:
            return []  # vLLM refuses them, with a sentence
        return embeddings_among_pictures(messages)

    def _connector(self) -> Any:
        return MEDIA_CONNECTOR_REGISTRY.load(envs.VLLM_MEDIA_CONNECTOR)
