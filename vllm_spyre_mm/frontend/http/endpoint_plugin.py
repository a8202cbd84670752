# SPDX-License-Identifier: Apache-2.0
"""An endpoint plugin of vLLM's: the embedding over HTTP.

Leans on: ``vllm.plugins.load_endpoint_plugins`` is asked once for each app of a server, for those
that attach to it. By itself it loads what ``VLLM_PLUGINS`` names alone; this plugin is there
without, as the platform's other features are.
"""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.engine_args import KEYWORD
from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

REPLACED = ("vllm.plugins.load_endpoint_plugins",)
"""Attributes of vLLM's that are replaced."""


class EmbeddingEndpointPlugin:
    """Adds what reads and writes embeddings to an app that generates, and ``/v1/mm_embeddings``.

    Attributes:
        required_tasks: of the servers that it is for; one that only renders has no engine.
    """

    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: "FastAPI") -> None:
        """Add the middleware, and the route where embeddings are returned."""
        from vllm_spyre_mm.frontend.http.middleware import EmbeddingMiddleware
        from vllm_spyre_mm.frontend.http.mm_embeddings import router

        app.add_middleware(EmbeddingMiddleware)
        if settings_of(app.state.args).enable_return_mm_embedding:
            app.include_router(router)

    async def init_state(
        self, engine_client: "EngineClient | None", state: "State", args: "Namespace"
    ) -> None:
        """There is none: the middleware finds what it needs in vLLM's."""


def settings_of(args: Any) -> SpyreSettings:
    """The settings that a server's command line gives, before its engine has resolved them."""
    settings = SpyreSettings.parse(getattr(args, "additional_config", {}))
    flag = getattr(args, KEYWORD, None)
    return settings.model_copy(update={KEYWORD: True}) if flag else settings


def install() -> None:
    """Let vLLM load the plugin as soon as it loads any."""
    when_loaded("vllm.plugins", _extend_loading)


def _extend_loading(module: ModuleType) -> None:
    require_attributes(module, ("load_endpoint_plugins",))
    if is_extended(module.load_endpoint_plugins, __name__):
        return
    original: Callable[..., list[Any]] = module.load_endpoint_plugins
    require_parameters(original, ("supported_tasks",))

    @extending(original, __name__)
    def load_endpoint_plugins(supported_tasks: Any = None) -> list[Any]:
        plugin = EmbeddingEndpointPlugin()
        wanted = set(plugin.required_tasks or ()) & set(supported_tasks or ())
        return [*([plugin] if wanted else []), *original(supported_tasks)]

    module.load_endpoint_plugins = load_endpoint_plugins  # type: ignore[attr-defined]
