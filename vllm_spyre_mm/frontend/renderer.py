# SPDX-License-Identifier: Apache-2.0
"""The platform's renderer: vLLM's, which makes prompts of chats, for chats with images and videos.

It is registered for tokenizers of Hugging Face, without which no processor of images works.

Leans on: ``render_chat_async`` renders every chat that comes over HTTP, and takes the messages as
dicts, and ``render_cmpl_async`` every other prompt; ``render_messages`` and
``render_messages_async`` render one conversation; the renderer of an engine makes, when it is made,
the cache of processed images that its requests share; ``shutdown`` is called when a server is told
to end, before its engine is.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from vllm import envs
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.media.connector import global_thread_pool
from vllm.renderers.hf import HfRenderer

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.grid_embeddings import load_numbers
from vllm_spyre_mm.frontend.mixed_chat import (
    EMBEDDINGS,
    embeddings_to_load,
    read_once,
    with_loaded,
)
from vllm_spyre_mm.upstream.contract import require_methods
from vllm_spyre_mm.vllm_fixes import chat_parts, sender_cache, shutdown_errors
from vllm_spyre_mm.vllm_fixes.media_connector import CheckedMediaConnector


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
    """Renders chats in which media and embeddings are mixed, and keeps clients apart."""

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
        connector = self._connector()
        for modality, embeddings in self._embeddings_to_load(messages, connector).items():
            loaded = [load_embedding(connector, modality, each) for each in embeddings]
            messages = with_loaded(messages, modality, loaded)
        return super().render_messages(messages, params)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        messages = [read_once(message) for message in messages]
        connector, loop = self._connector(), asyncio.get_running_loop()
        for modality, embeddings in self._embeddings_to_load(messages, connector).items():
            loading = (
                loop.run_in_executor(global_thread_pool, load_embedding, connector, modality, each)
                for each in embeddings
            )
            messages = with_loaded(messages, modality, await asyncio.gather(*loading))
        return await super().render_messages_async(messages, params)

    def _embeddings_to_load(self, messages: list[Any], connector: Any) -> dict[str, list[Any]]:
        """The embeddings of a chat that vLLM does not take as they are, by their modality."""
        multimodal = self.model_config.multimodal_config
        if multimodal is None or not multimodal.enable_mm_embeds:
            return {}  # vLLM refuses them, with a sentence
        fields = self.get_mm_processor().info.data_parser.embedding_fields
        modalities = ["image"]
        if isinstance(connector, CheckedMediaConnector):  # which knows loaded videos
            modalities.append("video")
        found = {
            modality: embeddings_to_load(messages, modality, has_grid=modality in fields)
            for modality in modalities
            # Where no media are allowed embeddings are, and vLLM does not count those.
            if multimodal.get_limit_per_prompt(modality)
        }
        return {modality: embeddings for modality, embeddings in found.items() if embeddings}

    def _connector(self) -> Any:
        return MEDIA_CONNECTOR_REGISTRY.load(envs.VLLM_MEDIA_CONNECTOR)


def load_embedding(connector: Any, modality: str, given: Any) -> Any:
    """An embedding of a chat: a tensor, or an object with one and numbers; None for None.

    Args:
        connector: vLLM's, or one of its kind.
        modality: vLLM's name.
        given: base64 text of a tensor, or an object of such texts and lists of numbers.

    Raises:
        ValueError: a text is no serialized tensor.
    """
    fetch = getattr(connector, f"fetch_{modality}_embedding")
    if not isinstance(given, Mapping):
        return None if given is None else fetch(given)

    def loaded(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return fetch(value) if name == EMBEDDINGS[modality] else load_numbers(name, value)

    return {name: loaded(name, value) for name, value in given.items()}
