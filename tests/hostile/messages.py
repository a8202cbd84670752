# SPDX-License-Identifier: Apache-2.0
"""Counts that do not match, and messages that are none."""

from collections.abc import Iterator
from typing import Any

from tests.hostile.case import (
    CHAT,
    EMBEDDINGS,
    Case,
    chat,
    good_part,
)


def count_cases(seed: str) -> Iterator[Case]:
    """More pictures than the limit."""
    for count in (5, 6, 20, 300):
        parts = [good_part(f"{seed}-{index % 3}") for index in range(count)]
        words = {"type": "text", "text": "What?"}
        yield Case(f"{count} pictures", CHAT, chat([*parts, words]), "refused")
        yield Case(f"{count} pictures to embed", EMBEDDINGS, {"input": parts}, "refused")
        messages = [{"role": "user", "content": [part]} for part in parts]
        yield Case(
            f"{count} messages with a picture", CHAT, chat("") | {"messages": messages}, "refused"
        )


def parts_of_all_kinds() -> dict[str, Any]:
    """Content parts that are none."""
    return {
        "a part without content": {"type": "image_url"},
        "a part of None": {"type": "image_url", "image_url": None},
        "a part of a text": {"type": "image_url", "image_url": "x"},
        "a part of a list": {"type": "image_url", "image_url": []},
        "no type": {"image_url": {"url": "x"}},
        "a type of None": {"type": None},
        "a type of a number": {"type": 5},
        "a type of a list": {"type": ["image_url"]},
        "an unknown type": {"type": "image"},
        "a video": {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        "a sound": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        "sound by URL": {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}},
        "a PIL image": {"type": "image_pil", "image_pil": "x"},
        "a file": {"type": "file", "file": {"file_id": "x"}},
        "embeddings of a prompt": {"type": "prompt_embeds", "data": "AAAA"},
        "embeddings of sound": {"type": "audio_embeds", "audio_embeds": "AAAA"},
        "a uuid alone": {"type": "image_url", "image_url": None, "uuid": "x"},
        "an empty part": {},
        "a uuid of an object": {"type": "image_url", "image_url": {"url": "x"}, "uuid": {"a": 1}},
    }


def part_cases() -> Iterator[Case]:
    for name, part in parts_of_all_kinds().items():
        content = [part, {"type": "text", "text": "What?"}]
        yield Case(f"{name} in a chat", CHAT, chat(content), "refused")
        yield Case(f"{name} to embed", EMBEDDINGS, {"input": [part]}, "refused")


def messages_of_all_kinds() -> dict[str, Any]:
    """Lists of messages that are none, or odd ones."""
    return {
        "no messages": [],
        "None": None,
        "a text": "Hi",
        "a message of None": [None],
        "a message of text": ["Hi"],
        "no role": [{"content": "Hi"}],
        "no content": [{"role": "user"}],
        "content of None": [{"role": "user", "content": None}],
        "content of a number": [{"role": "user", "content": 5}],
        "no parts": [{"role": "user", "content": []}],
        "a part of text": [{"role": "user", "content": ["Hi"]}],
        "text of None": [{"role": "user", "content": [{"type": "text", "text": None}]}],
        "text of a number": [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        "text of a list": [{"role": "user", "content": [{"type": "text", "text": ["Hi"]}]}],
        "an unknown role": [{"role": "x", "content": "Hi"}],
        "a role of a number": [{"role": 5, "content": "Hi"}],
        "tool calls of text": [{"role": "assistant", "content": "Hi", "tool_calls": "x"}],
        "tool calls of None": [{"role": "assistant", "content": "Hi", "tool_calls": [None]}],
        "tool calls of numbers": [
            {"role": "assistant", "tool_calls": [{"function": {"name": 5, "arguments": 5}}]}
        ],
        "arguments that are no JSON": [
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "x", "arguments": "{"}}
                ],
            }
        ],
        "1,000 messages": [{"role": "user", "content": "Hi"}] * 1000,
        "an object": {"role": "user"},
        "an extra field": [{"role": "user", "content": "Hi", "x": {"y": [1]}}],
        "reasoning": [{"role": "assistant", "content": "Hi", "reasoning_content": {"a": 1}}],
    }


def message_cases() -> Iterator[Case]:
    for name, messages in messages_of_all_kinds().items():
        yield Case(f"messages: {name}", CHAT, chat("") | {"messages": messages})
