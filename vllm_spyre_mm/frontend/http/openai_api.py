# SPDX-License-Identifier: Apache-2.0
"""The embedding over HTTP: a field in requests, and one in responses to those that ask.

Leans on: ``OpenAIServingChat``, its subclass for batches and ``OpenAIServingCompletion`` turn a
request's ``vllm_xargs`` into ``SamplingParams.extra_args``, and make every response in the
generators that are wrapped here; request and response models keep fields that they do not declare.
``build_app`` calls ``attach_endpoint_plugins`` once for an app, whose state has the arguments. A
response to a request without the field is vLLM's, byte for byte: nothing of it is touched.

What other routes answer to a request that asks is said by :mod:`.middleware`; who gets an embedding
without asking, by :mod:`vllm_spyre_mm.frontend.unasked`.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from types import ModuleType
from typing import Any

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.frontend.engine_args import KEYWORD
from vllm_spyre_mm.frontend.http.middleware import PENDING, EmbeddingMiddleware
from vllm_spyre_mm.frontend.http.openai_requests import ask_of, read_field
from vllm_spyre_mm.multimodal.embedding import EXTRA_ARG, EmbeddingChoice, parse_choice
from vllm_spyre_mm.payload import encode_mm_embedding, mm_embedding_text
from vllm_spyre_mm.upstream.contract import require_attributes, require_parameters
from vllm_spyre_mm.upstream.marks import extending, is_extended
from vllm_spyre_mm.upstream.module_loading import when_loaded

FIELD = "mm_embedding"
"""Of the choice that finishes."""

Noted = dict[int, Any]
"""By index of the choice: the embedding as JSON or what stands for it in the response, None for a
request without images."""


def install() -> None:
    """Extend vLLM's OpenAI-compatible server as soon as its parts exist."""
    when_loaded("vllm.entrypoints.openai.chat_completion.serving", _extend_chat)
    when_loaded("vllm.entrypoints.openai.chat_completion.batch_serving", _extend_batch)
    when_loaded("vllm.entrypoints.openai.completion.serving", _extend_completion)
    when_loaded("vllm.entrypoints.openai.models.serving", _extend_models)
    when_loaded("vllm.entrypoints.launchers.app", _add_routes)


# -- requests -------------------------------------------------------------------------------------


def _choice_of(request: Any) -> EmbeddingChoice | None:
    value = (request.vllm_xargs or {}).get(EXTRA_ARG)
    return None if value is None else parse_choice(value)


def _reading(original: Callable[..., Any]) -> Callable[..., Any]:
    @extending(original, __name__)
    async def create(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        read_field(request, SpyreSettings.from_vllm_config(self.engine_client.vllm_config))
        return await original(self, request, *args, **kwargs)

    return create


# -- responses ------------------------------------------------------------------------------------


def _note(noted: Noted, outputs: Iterable[Any], choice: EmbeddingChoice, first: int = 0) -> None:
    """Note the embeddings of the outputs that finish; ``first`` is the index of the first one."""
    for output in outputs:
        if output.finish_reason is not None:
            noted[first + output.index] = _value(output, choice)


def _value(output: Any, choice: EmbeddingChoice) -> Any:
    """What the response has for an output's embedding: its JSON, or what stands for it."""
    if output.mm_embedding is None:
        return None
    arguments = output.mm_embedding, output.mm_embedding_info, choice.encoding_format
    pending = PENDING.get()
    if pending is None:
        return encode_mm_embedding(*arguments)
    return pending.add(mm_embedding_text(*arguments))


def add_to_event(event: str, noted: Noted) -> str:
    """A server-sent event with the embeddings on the choices that finish in it."""
    if not event.startswith("data: {"):
        return event
    body = json.loads(event.removeprefix("data: "))
    finished = [
        choice for choice in body.get("choices", ()) if choice.get("finish_reason") is not None
    ]
    for choice in finished:
        choice[FIELD] = noted.get(choice["index"])
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n" if finished else event


def _add_to_response(response: Any, noted: Noted) -> Any:
    for choice in getattr(response, "choices", ()):  # an error has none
        setattr(choice, FIELD, noted.get(choice.index))
    return response


def _extend_chat(module: ModuleType) -> None:
    require_attributes(module, ("OpenAIServingChat",))
    serving = module.OpenAIServingChat
    if is_extended(serving.chat_completion_full_generator, __name__):
        return
    require_parameters(serving.create_chat_completion, ("request", "raw_request"))
    for name in ("chat_completion_full_generator", "chat_completion_stream_generator"):
        require_parameters(getattr(serving, name), ("request", "result_generator"))
    serving.create_chat_completion = _reading(serving.create_chat_completion)
    full, stream = serving.chat_completion_full_generator, serving.chat_completion_stream_generator

    async def noting(outputs: Any, noted: Noted, choice: EmbeddingChoice) -> AsyncIterator[Any]:
        async for output in outputs:
            _note(noted, output.outputs, choice)
            yield output

    @extending(full, __name__)
    async def chat_completion_full_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        choice, noted = _choice_of(request), Noted()
        if choice is None:
            return await full(self, request, result_generator, *args, **kwargs)
        outputs = noting(result_generator, noted, choice)
        return _add_to_response(await full(self, request, outputs, *args, **kwargs), noted)

    @extending(stream, __name__)
    async def chat_completion_stream_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[str]:
        choice, noted = _choice_of(request), Noted()
        if choice is not None:
            result_generator = noting(result_generator, noted, choice)
        events = stream(self, request, result_generator, *args, **kwargs)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event if choice is None else add_to_event(event, noted)

    serving.chat_completion_full_generator = chat_completion_full_generator
    serving.chat_completion_stream_generator = chat_completion_stream_generator


def _extend_batch(module: ModuleType) -> None:
    require_attributes(module, ("OpenAIServingChatBatch",))
    serving = module.OpenAIServingChatBatch
    if is_extended(serving.create_batch_chat_completion, __name__):
        return
    require_parameters(serving.create_batch_chat_completion, ("request", "raw_request"))
    require_parameters(serving.render_batch_chat_request, ("request",))
    require_parameters(serving.chat_completion_full_generator_batch, ("request", "generators"))
    create, render = serving.create_batch_chat_completion, serving.render_batch_chat_request
    full = serving.chat_completion_full_generator_batch

    @extending(create, __name__)
    async def create_batch_chat_completion(self: Any, request: Any, *rest: Any, **more: Any) -> Any:
        ask_of(request)  # refused before any picture is processed
        return await create(self, request, *rest, **more)

    @extending(render, __name__)
    async def render_batch_chat_request(self: Any, request: Any) -> Any:
        result = await render(self, request)
        if isinstance(result, tuple):  # and no error
            settings = SpyreSettings.from_vllm_config(self.engine_client.vllm_config)
            for single in result[0]:
                read_field(single, settings, answers=len(result[0]))
        return result

    async def noting(
        outputs: Any, noted: Noted, choice: EmbeddingChoice, place: int
    ) -> AsyncIterator[Any]:
        async for output in outputs:
            _note(noted, output.outputs, choice, first=place)
            yield output

    @extending(full, __name__)
    async def chat_completion_full_generator_batch(
        self: Any, request: Any, generators: Any, *args: Any, **kwargs: Any
    ) -> Any:
        choice, noted = ask_of(request), Noted()
        if choice is None:
            return await full(self, request, generators, *args, **kwargs)
        outputs = [noting(each, noted, choice, place) for place, each in enumerate(generators)]
        return _add_to_response(await full(self, request, outputs, *args, **kwargs), noted)

    serving.create_batch_chat_completion = create_batch_chat_completion
    serving.render_batch_chat_request = render_batch_chat_request
    serving.chat_completion_full_generator_batch = chat_completion_full_generator_batch


def _extend_completion(module: ModuleType) -> None:
    require_attributes(module, ("OpenAIServingCompletion",))
    serving = module.OpenAIServingCompletion
    if is_extended(serving.completion_stream_generator, __name__):
        return
    require_parameters(serving.create_completion, ("request", "raw_request"))
    require_parameters(
        serving.completion_stream_generator, ("request", "engine_inputs", "result_generator")
    )
    require_parameters(
        serving.request_output_to_completion_response, ("final_res_batch", "request")
    )
    serving.create_completion = _reading(serving.create_completion)
    stream = serving.completion_stream_generator
    full = serving.request_output_to_completion_response

    async def noting(
        outputs: Any, noted: Noted, choice: EmbeddingChoice, per_prompt: int
    ) -> AsyncIterator[Any]:
        async for prompt, output in outputs:
            _note(noted, output.outputs, choice, first=prompt * per_prompt)
            yield prompt, output

    @extending(full, __name__)
    def request_output_to_completion_response(
        self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = full(self, final_res_batch, request, *args, **kwargs)
        choice, noted = _choice_of(request), Noted()
        if choice is None:
            return response
        for prompt, output in enumerate(final_res_batch):
            _note(noted, output.outputs, choice, first=prompt * (request.n or 1))
        return _add_to_response(response, noted)

    @extending(stream, __name__)
    async def completion_stream_generator(
        self: Any,
        request: Any,
        engine_inputs: Any,
        result_generator: Any,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        choice, noted = _choice_of(request), Noted()
        if choice is not None:
            result_generator = noting(result_generator, noted, choice, request.n or 1)
        events = stream(self, request, engine_inputs, result_generator, *args, **kwargs)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event if choice is None else add_to_event(event, noted)

    serving.request_output_to_completion_response = request_output_to_completion_response
    serving.completion_stream_generator = completion_stream_generator


def _extend_models(module: ModuleType) -> None:
    require_attributes(module, ("OpenAIServingModels",))
    serving = module.OpenAIServingModels
    if is_extended(serving.show_available_models, __name__):
        return
    original = serving.show_available_models

    @extending(original, __name__)
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        config = self.engine_client.vllm_config
        settings = SpyreSettings.from_vllm_config(config)
        if settings.enable_return_mm_embedding:
            for card in models.data:
                card.mm_embedding = {
                    "hidden_size": config.model_config.get_hidden_size(),
                    "dtype": settings.encoder_dtype,
                    "max_bytes": settings.max_mm_embedding_response_bytes,
                }
        return models

    serving.show_available_models = show_available_models


def settings_of(args: Any) -> SpyreSettings:
    """The settings that a server's command line gives, before its engine has resolved them."""
    settings = SpyreSettings.parse(getattr(args, "additional_config", {}))
    flag = getattr(args, KEYWORD, False)
    return settings.model_copy(update={KEYWORD: True}) if flag else settings


def _add_routes(module: ModuleType) -> None:
    require_attributes(module, ("attach_endpoint_plugins",))
    if is_extended(module.attach_endpoint_plugins, __name__):
        return
    original = module.attach_endpoint_plugins
    require_parameters(original, ("app", "supported_tasks"))

    @extending(original, __name__)
    def attach_endpoint_plugins(app: Any, supported_tasks: Any) -> None:
        from vllm_spyre_mm.frontend.http.mm_embeddings import router

        if "generate" in supported_tasks:  # a server that only renders has no engine
            app.add_middleware(EmbeddingMiddleware)
            if settings_of(app.state.args).enable_return_mm_embedding:
                app.include_router(router)
        original(app, supported_tasks)

    module.attach_endpoint_plugins = attach_endpoint_plugins  # type: ignore[attr-defined]
