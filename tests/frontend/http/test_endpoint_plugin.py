# SPDX-License-Identifier: Apache-2.0
"""A server that generates has what reads and writes embeddings."""

from types import ModuleType, SimpleNamespace

import pytest
from fastapi import FastAPI
from vllm import plugins
from vllm.entrypoints.launchers import app as launchers

from vllm_spyre_mm.frontend.http import endpoint_plugin
from vllm_spyre_mm.frontend.http.middleware import EmbeddingMiddleware

KEY_OF_SETTING = "enable_return_mm_embedding"


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("by", ["flag", "config"])
@pytest.mark.parametrize("task", ["generate", "render"])
def test_the_route_of_images_alone_is_there_when_the_feature_is_on(on: bool, by: str, task: str):
    endpoint_plugin.install()
    app = FastAPI()
    config = {KEY_OF_SETTING: on} if by == "config" else {}
    args = {"additional_config": config, KEY_OF_SETTING: on and by == "flag"}
    app.state.args = SimpleNamespace(**args)
    launchers.attach_endpoint_plugins(app, (task,))
    has_engine = task == "generate"
    there = "/v1/mm_embeddings" in app.openapi()["paths"]
    assert there is (on and has_engine)
    assert (EmbeddingMiddleware in [each.cls for each in app.user_middleware]) is has_engine


def test_plugins_of_others_are_loaded_too(monkeypatch: pytest.MonkeyPatch):
    module = ModuleType("vllm.plugins")
    module.load_endpoint_plugins = lambda supported_tasks=None: [supported_tasks]  # type: ignore[attr-defined]
    endpoint_plugin._extend_loading(module)
    own, other = module.load_endpoint_plugins(("generate",))
    assert isinstance(own, endpoint_plugin.EmbeddingEndpointPlugin)
    assert other == ("generate",)
    assert module.load_endpoint_plugins() == [None]


def test_wrapped_once():
    endpoint_plugin.install()
    before = plugins.load_endpoint_plugins
    endpoint_plugin.install()
    assert plugins.load_endpoint_plugins is before
