# SPDX-License-Identifier: Apache-2.0
"""Chats are rendered by the platform's renderer, as they are given to vLLM's."""

import asyncio
import base64
import io
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.renderers import ChatParams, renderer_from_config
from vllm.renderers.hf import HfRenderer

from vllm_spyre_mm.demo import checkpoint_path
from vllm_spyre_mm.frontend import renderer_registration
from vllm_spyre_mm.frontend.renderer import ImageRenderer, check_base
from vllm_spyre_mm.upstream.contract import UnsupportedVllmError
from vllm_spyre_mm.vllm_fixes.sender_cache import SenderCache
from vllm_spyre_mm.vllm_fixes.shutdown_errors import SHUT_DOWN

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
NAMED = IMAGE | {"uuid": "mine"}


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    arguments = EngineArgs(
        model=str(checkpoint_path()), enable_mm_embeds=True, limit_mm_per_prompt={"image": 3}
    )
    return arguments.create_engine_config()


@pytest.fixture(scope="module")
def renderer(config: VllmConfig) -> Iterator[ImageRenderer]:
    """As an engine makes it."""
    made = renderer_from_config(config)
    yield made
    made.shutdown()


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def picture(color: str) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}


def embedding(config: VllmConfig, num_rows: int) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(torch.ones(num_rows, config.model_config.get_hidden_size()), file)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getvalue()).decode()}


def test_engines_take_it(renderer: ImageRenderer) -> None:
    assert type(renderer) is ImageRenderer
    assert type(renderer.mm_processor_cache) is SenderCache


def test_without_fixes_it_has_vllms_cache(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPYRE_MM_VLLM_FIXES", "0")
    made = renderer_from_config(config)
    assert type(made) is ImageRenderer
    assert type(made.mm_processor_cache) is LruKeyReplicatedSenderCache
    made.shutdown()


@pytest.mark.parametrize("over_http", [False, True], ids=["LLM", "server"])
def test_pictures_and_embeddings_of_a_chat_keep_their_order(
    config: VllmConfig, renderer: ImageRenderer, over_http: bool
) -> None:
    parts = (embedding(config, 5), picture("red"), embedding(config, 3))
    chat = [user(*parts, {"type": "text", "text": "hello"})]
    if over_http:
        _, (prompt,) = asyncio.run(renderer.render_chat_async([chat], ChatParams()))
    else:
        _, (prompt,) = renderer.render_chat([chat], ChatParams())
    first, second, third = prompt["mm_placeholders"]["image"]
    assert (first.length, third.length) == (5, 3)
    assert second.length > 5
    assert first.offset < second.offset < third.offset


@pytest.mark.parametrize(
    ("settings", "fixes", "expected"),
    [
        ({}, "1", IMAGE),
        ({"trust_client_image_uuids": True}, "1", NAMED),
        ({}, "0", NAMED),
    ],
)
def test_what_the_renderer_is_given(
    settings: dict[str, Any], fixes: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``trust_client_image_uuids`` leaves it to vLLM, and so do fixes that are switched off."""
    rendered: list[Any] = []

    async def render_chat_async(self: Any, conversations: Any, params: Any) -> None:
        rendered.extend((conversations, params))

    monkeypatch.setattr(HfRenderer, "render_chat_async", render_chat_async)
    monkeypatch.setenv("SPYRE_MM_VLLM_FIXES", fixes)
    renderer = ImageRenderer.__new__(ImageRenderer)
    renderer.config = SimpleNamespace(additional_config=settings)  # type: ignore[assignment]
    asyncio.run(renderer.render_chat_async([[user(NAMED)]], "params"))
    assert rendered == [[[user(expected)]], "params"]


def test_faulty_fields_of_an_embedding_are_refused(renderer: ImageRenderer) -> None:
    part = {"type": "image_embeds", "image_embeds": {"x": 5}}
    with pytest.raises(VLLMValidationError, match="'x' of an embedding must be base64 text"):
        asyncio.run(renderer.render_chat_async([[user(part)]], ChatParams()))


def test_a_renderer_of_a_server_that_ends_tells_clients_to_go_elsewhere(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those whose picture waits for its turn, or whose prompt is not a chat."""

    def ask(made: ImageRenderer) -> None:
        with pytest.raises(Exception, match=sentence) as raised:
            asyncio.run(made.render_chat_async([[user(picture("red"))]], ChatParams()))
        assert isinstance(raised.value, GracefulHTTPError) is ends
        with pytest.raises(type(raised.value), match=sentence):
            asyncio.run(made.render_cmpl_async([{"prompt": "Hello"}]))

    for fixes in ("1", "0"):
        ends, sentence = fixes == "1", SHUT_DOWN if fixes == "1" else "cannot schedule new futures"
        monkeypatch.setenv("SPYRE_MM_VLLM_FIXES", fixes)
        made = renderer_from_config(config)
        made.shutdown()
        ask(made)


def registry(registered: Any) -> Any:
    module: Any = ModuleType("vllm.renderers.registry")
    module.RENDERER_REGISTRY = SimpleNamespace(renderers={"hf": registered})
    return module


def test_it_is_registered_once() -> None:
    module = registry(renderer_registration.VLLMS)
    for _ in range(2):
        renderer_registration._register_renderer(module)
        assert module.RENDERER_REGISTRY.renderers == {"hf": renderer_registration.OURS}


def test_a_registry_that_is_not_as_expected_is_refused() -> None:
    with pytest.raises(UnsupportedVllmError, match="no 'RENDERER_REGISTRY'"):
        renderer_registration._register_renderer(ModuleType("vllm.renderers.registry"))
    with pytest.raises(UnsupportedVllmError, match="the renderer 'hf' is"):
        renderer_registration._register_renderer(registry(("another", "Renderer")))


def test_a_renderer_that_would_not_call_what_is_overridden_is_refused() -> None:
    """Without it clients would share their images, and nothing said so."""

    class Renderer:
        render_messages = render_messages_async = render_cmpl_async = shutdown = None

        async def render_chat_async(self, chats: Any) -> None:
            """A vLLM that calls its parameter otherwise."""

    with pytest.raises(UnsupportedVllmError, match="no parameter 'conversations'"):
        check_base(Renderer)
    del Renderer.render_chat_async
    with pytest.raises(UnsupportedVllmError, match="no 'render_chat_async'"):
        check_base(Renderer)
