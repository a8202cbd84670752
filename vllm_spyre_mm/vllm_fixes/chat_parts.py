# SPDX-License-Identifier: Apache-2.0
"""Keeps images of one client from being taken for those of another.

Leans on: ``BaseRenderer.render_chat_async`` renders every chat that comes over HTTP, has the
``config``, and takes the messages as dicts; ``_load_embeds_dict`` of ``vllm.renderers.chat_utils``
reads an embedding that is given as an object.

A ``uuid`` beside an image is vLLM's key of it in every cache, as it stands: two clients that choose
the same one, by chance or not, share the features of one image.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

MEDIA = ("image_url", "image_embeds", "image_pil")
"""Fields of a content part that hold an image."""


def install() -> None:
    """Extend vLLM's renderer of chats as soon as it exists."""
    when_loaded("vllm.renderers.base", _extend_renderer)
    when_loaded("vllm.renderers.chat_utils", _extend_embeds)


def without_uuids(message: Any) -> Any:
    """A chat message whose images are told apart by their content.

    Raises:
        VLLMValidationError: an image is named and not sent (HTTP 400).
    """
    content = message.get("content") if isinstance(message, Mapping) else None
    if content is None or isinstance(content, (str, Mapping)):
        return message
    # vLLM's request models validate content while it is iterated, once.
    return {**message, "content": [_without_uuid(part) for part in content]}


def _without_uuid(part: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    if not isinstance(part, Mapping) or part.get("uuid") is None:
        return part
    if all(part.get(name) is None for name in MEDIA):
        raise VLLMValidationError(
            "an image is named by its uuid alone, and this server knows images by their content: "
            "send the image, or start the server with trust_client_image_uuids",
            parameter="uuid",
        )
    return {name: value for name, value in part.items() if name != "uuid"}


def _extend_renderer(module: ModuleType) -> None:
    require_attributes(module, ("BaseRenderer",))
    renderer = module.BaseRenderer
    original = renderer.render_chat_async
    if is_extended(original, __name__):
        return
    require_parameters(original, ("conversations",))
    require_parameters(renderer.__init__, ("config",))

    @extending(original, __name__)
    async def render_chat_async(self: Any, conversations: Any, *args: Any, **kwargs: Any) -> Any:
        if not SpyreSettings.from_vllm_config(self.config).trust_client_image_uuids:
            conversations = [[without_uuids(each) for each in chat] for chat in conversations]
        return await original(self, conversations, *args, **kwargs)

    renderer.render_chat_async = render_chat_async


def _extend_embeds(module: ModuleType) -> None:
    require_attributes(module, ("_load_embeds_dict",))
    if not is_extended(module._load_embeds_dict, __name__):
        require_parameters(module._load_embeds_dict, ("data", "fetch"))
        module._load_embeds_dict = _checking(module._load_embeds_dict)  # type: ignore[attr-defined]


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses fields of an embedding that are neither base64 nor a list, which vLLM fails at."""
    from vllm.exceptions import VLLMValidationError

    @extending(original, __name__)
    async def _load_embeds_dict(data: Any, fetch: Any) -> dict[str, Any]:
        loaded = await original(data, fetch)
        for name, value in loaded.items():
            if not isinstance(value, (torch.Tensor, list)):
                raise VLLMValidationError(
                    f"the field {name!r} of an embedding must be base64 text or a list of numbers, "
                    f"not {type(value).__name__}",
                    parameter="image_embeds",
                )
        return loaded

    return _load_embeds_dict
