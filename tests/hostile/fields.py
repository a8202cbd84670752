# SPDX-License-Identifier: Apache-2.0
"""Fields of requests with values that nobody means: vLLM's, unknown ones, and the project's own."""

import itertools
from collections.abc import Iterator
from typing import Any

from tests.hostile.case import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    QUESTION,
    Case,
    Verdict,
    chat,
    chat_prompt,
    completion,
    drawn,
    good_part,
)

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, -(2**31), 2**63, -(2**63) - 1, 10**30, 0.5, -0.5, 1e308,
    "", "0", "x", "\0", "漢" * 50, "x" * 5000, [], [[]], [None], ["x"] * 300, {}, {"x": 1},
    {"a": {"b": {"c": {}}}},
)  # fmt: skip
"""A value of each type, and of each size."""

NUMBERS = (
    "n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs",
    "top_logprobs", "frequency_penalty", "presence_penalty", "repetition_penalty", "priority",
    "prompt_logprobs", "truncate_prompt_tokens",
)  # fmt: skip

OTHERS = (
    "stop", "stop_token_ids", "bad_words", "logit_bias", "stream", "stream_options",
    "response_format", "structured_outputs", "tools", "tool_choice", "cache_salt", "request_id",
    "mm_processor_kwargs", "media_io_kwargs", "chat_template", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", "echo", "include_stop_str_in_output",
    "skip_special_tokens", "spaces_between_special_tokens", "ignore_eos", "use_beam_search",
    "allowed_token_ids", "return_token_ids", "return_tokens_as_token_ids", "vllm_xargs",
    "kv_transfer_params", "reasoning_effort", "messages", "model", "documents", "suffix", "best_of",
    "thinking_token_budget", "logits_processors", "guided_json", "prompt_embeds",
    "repetition_detection",
)  # fmt: skip


def field_cases() -> Iterator[Case]:
    """Every odd value of every field, in a chat or in a completion."""
    fields = itertools.product((*NUMBERS, *OTHERS), enumerate(ODD))
    for number, (field, (index, value)) in enumerate(fields):
        name = f"{field}={str(value)[:20]!r} ({index})"
        if field == "structured_outputs" and not isinstance(value, dict):
            continue  # upstream.py
        if (number + index) % 2:
            yield Case(f"a completion with {name}", COMPLETIONS, completion("Hi", **{field: value}))
        else:
            yield Case(f"a chat with {name}", CHAT, chat("Hi", **{field: value}))


NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-0", "1" * 400)


def not_a_number_cases() -> Iterator[Case]:
    """What Python's JSON reads as a number and no other does."""
    for field, value in itertools.product(NUMBERS, NOT_NUMBERS):
        body = f'{{"model": "demo", "prompt": "Hi", "max_tokens": 4, "{field}": {value}}}'
        yield Case(f"{field}={value[:10]} as JSON", COMPLETIONS, body.encode())


def gigantic_cases(seed: str) -> Iterator[Case]:
    """Many answers for one question. vLLM allows 16,384, which would be honest work for minutes."""
    parts = [good_part(seed), {"type": "text", "text": QUESTION}]
    for n in (16385, 10**6, 2**31 - 1, 2**31, 2**63, 10**30):
        yield Case(f"{n} answers", CHAT, chat("Hi", n=n), "refused")
        yield Case(f"{n} answers about a picture", CHAT, chat(parts, n=n), "refused")
        yield Case(f"{n} answers to complete", COMPLETIONS, completion("Hi", n=n), "refused")
    for n in (1025, 5000):
        yield Case(f"{n} prompts", COMPLETIONS, completion(["Hi"] * n), "refused")
    sampled = {"max_tokens": 1, "temperature": 1}
    yield Case("100 answers", CHAT, chat("Hi", n=100, **sampled), "answered")
    yield Case("100 prompts", COMPLETIONS, completion(["Hi"] * 100, max_tokens=1), "answered")
    # 64 rows of 256 float32 elements each: 80 MB, more than a response may have.
    body = chat(parts, n=1200, return_mm_embedding=True, **sampled)
    yield Case("1,200 answers with their embeddings", CHAT, body, "refused")


PROCESSOR = (
    {"size": {"height": 10**6, "width": 10**6}}, {"do_resize": False}, {"patch_size": 0},
    {"image_grid_pinpoints": [[10**6, 10**6]]}, {"images": []}, {"x": 1},
)  # fmt: skip
MEDIA = (
    {"image": {"image_mode": "L"}}, {"image": {"rgba_background_color": [0, 0, 0]}}, {"image": 5},
    {"video": {"num_frames": 10**9}},
)  # fmt: skip
TEMPLATES = ("{{ messages }}", "{%", "{% for i in range(10**9) %}x{% endfor %}", "<image>")


def processing_cases(seed: str) -> Iterator[Case]:
    """How pictures are processed and chats are written is not the client's to choose."""
    parts = [good_part(seed), {"type": "text", "text": QUESTION}]
    fields = (
        ("mm_processor_kwargs", PROCESSOR),
        ("media_io_kwargs", MEDIA),
        ("chat_template", TEMPLATES),
    )
    for field, values in fields:
        for index, value in enumerate(values):
            yield Case(f"{field} ({index})", CHAT, chat(parts, **{field: value}), "refused")
    for name in ("chat_template", "conversation", "messages"):
        body = chat(parts, chat_template_kwargs={name: "x"})
        yield Case(f"chat_template_kwargs with {name}", CHAT, body, "refused")


CHOICES: tuple[Any, ...] = (
    "yes", "", 2, -1, 1.5, 10**30, [], [True], {"pool": 1}, {"pooling": None}, {"pooling": "x"},
    {"pooling": 1}, {"pooling": ["raw"]}, {"pooling": "grid"}, {"pooling": "raw", "grid": [1, 1]},
    *({"pooling": "grid", "grid": grid} for grid in (
        [], [1], [1, 1, 1], [0, 1], [-1, 1], [65, 1], [2**40, 2**40], ["a", 1], [1.5, 1], [None, 1],
        [True, "1"], "11", {"0": 1}, 1, [[1], [1]],
    )),
    {"newlines": "no"}, {"newlines": 2}, {"dtype": "float64"}, {"dtype": 32}, {"dtype": "int8 "},
    {"generate": False}, {"generate": "false"}, {"generate": None}, {"encoding_format": "hex"},
    {"encoding_format": None}, {"max_bytes": 0}, {"max_bytes": -1}, {"max_bytes": 1},
    {"max_bytes": 1.5}, {"max_bytes": "1"}, {"max_bytes": 10**40, "dtype": "x"}, {"": ""},
    {"a": {"a": {"a": {}}}}, {"pooling": "raw\0"}, {"__class__": "x"}, {"model_config": {}},
)  # fmt: skip
"""Values of ``return_mm_embedding`` that there are not."""


def own_field_cases(seed: str) -> Iterator[Case]:
    """``return_mm_embedding`` and ``encoding_format``, where they belong and through vllm_xargs."""
    parts = [good_part(seed), {"type": "text", "text": QUESTION}]
    for index, choice in enumerate(CHOICES):
        name = f"return_mm_embedding={str(choice)[:40]!r} ({index})"
        yield Case(f"a chat with {name}", CHAT, chat(parts, return_mm_embedding=choice), "refused")
        given = {"return_mm_embedding": choice}
        yield Case(f"vllm_xargs with {name}", CHAT, chat(parts, vllm_xargs=given), "refused")
        body = {"input": parts[:1], "return_mm_embedding": choice}
        alone: Verdict = "answered" if choice == {"generate": False} else "refused"
        yield Case(f"embedding alone with {name}", EMBEDDINGS, body, alone)
        without: Verdict = "answered" if choice == {"max_bytes": 1} else "refused"
        yield Case(f"a completion with {name}", COMPLETIONS, completion("Hi", **given), without)
    for index, value in enumerate(ODD):
        shown = f"{str(value)[:20]!r} ({index})"
        body = chat(parts, return_mm_embedding=True, encoding_format=value)
        verdict: Verdict = "answered" if value is None else "refused"
        yield Case(f"a chat with encoding_format={shown}", CHAT, body, verdict)
        for field in ("encoding_format", "dimensions", "input"):
            body = {"input": parts[:1]} | {field: value}
            yield Case(f"embedding alone with {field}={shown}", EMBEDDINGS, body, "refused")
        yield Case(f"embedding alone of {shown}", EMBEDDINGS, {"input": [value]}, "refused")
    whole, prompt = (drawn(seed),), chat_prompt(QUESTION, 1)
    for yes in (True, 1, 1.0, {}, {"pooling": "raw"}, {"generate": True}):
        body = chat(parts, return_mm_embedding=yes)
        yield Case(f"return_mm_embedding={yes!r}", CHAT, body, "answered", whole, prompt)


UNKNOWN = (
    "x", "", "\0", "__class__", "__proto__", "self", "request", "漢字", "a" * 9000, "mm_embedding",
    "model_extra", "model_fields_set", "image", "multi_modal_data", "multi_modal_uuids", "features",
    "mm_hashes", "cache", "vllm_config", "extra_args",
)  # fmt: skip


def unknown_field_cases() -> Iterator[Case]:
    """Fields that there are not; vLLM ignores them, as OpenAI's clients expect."""
    for name, value in itertools.product(UNKNOWN, (None, 1, {"a": [1]}, "x")):
        body = chat("Hi", **{name: value})
        title = f"an unknown field {name[:20]!r}: {value}"
        yield Case(title, CHAT, body, "either", None, chat_prompt("Hi"))
