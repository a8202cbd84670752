# SPDX-License-Identifier: Apache-2.0
"""Every hostile request."""

import itertools
from collections.abc import Iterator

from tests.hostile import (
    embeds,
    fields,
    letters,
    messages,
    pictures,
    placeholders,
    urls,
    wire,
)
from tests.hostile.case import Case


def all_cases(seed: str) -> Iterator[Case]:
    """The cases of one seed; which of their bytes are damaged, and how, depends on it."""
    return itertools.chain(
        pictures.file_cases(seed),
        pictures.media_type_cases(seed),
        pictures.base64_cases(seed),
        urls.url_cases(),
        embeds.embedding_cases(),
        placeholders.placeholder_cases(seed),
        placeholders.token_cases(),
        messages.count_cases(seed),
        messages.part_cases(),
        messages.message_cases(),
        letters.unicode_cases(seed),
        fields.field_cases(),
        fields.not_a_number_cases(),
        fields.gigantic_cases(seed),
        fields.processing_cases(seed),
        fields.own_field_cases(seed),
        fields.unknown_field_cases(),
        wire.body_cases(),
        wire.other_endpoint_cases(),
    )
