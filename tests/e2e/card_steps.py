# SPDX-License-Identifier: Apache-2.0
"""Inputs of a run for the card, right and wrong, each with what the stand-in has to say of it."""

from typing import Any

import torch

CHUNK, MAX_CONTEXT, MAX_ROWS, BATCH_TKV = 128, 512, 4, 1024

Step = dict[str, torch.Tensor]


def with_cache(step: dict[str, list[Any]]) -> Step:
    """The inputs of a graph with a model of one layer."""
    tensors = {f"l_inputs_{name}_": torch.tensor(values) for name, values in step.items()}
    rows, length = step["slot_mapping"].__len__(), len(step["slot_mapping"][0])
    cache = torch.zeros(12, 64, 1, 128, dtype=torch.float16)
    return {
        "l_self_modules_decoder_parameters_weight_": torch.zeros(8, 8, dtype=torch.float16),
        "l_embeds_": torch.zeros(rows, length, 8, dtype=torch.float16),
        **tensors,
        "l_inputs_past_key_value_states_0_0_": cache,
        "l_inputs_past_key_value_states_0_1_": cache.clone(),
    }


def decode_step(**changes: list[Any]) -> Step:
    """A decode of three rows of 5, 70 and 130 tokens that keeps the contract, but for changes."""
    step: dict[str, list[Any]] = {
        "position_ids": [[4], [69], [129]],
        "slot_mapping": [[7 * 64 + 4], [3 * 64 + 5], [6 * 64 + 1]],
        "block_table": [[0, 0, 7], [0, 2, 3], [4, 5, 6]],
        "current_tkv_mask": [128 + 5, 64 + 70, 130],
        "left_padded_prompt_mask": [128, 64, 0],
    }
    return with_cache({**step, **changes})


def chunk_step(**changes: list[Any]) -> Step:
    """The only chunk of a prompt of 60 tokens, after a block of padding, but for changes."""
    step: dict[str, list[Any]] = {
        "position_ids": [[*[0] * 64, *range(60), *[0] * 4]],
        "slot_mapping": [[*range(64), *range(9 * 64, 10 * 64)]],
        "block_table": [[0, 9]],
        "current_tkv_mask": [128],
        "left_padded_prompt_mask": [64],
    }
    return with_cache({**step, **changes})


def lone_row() -> Step:
    """One row of one block."""
    return with_cache(
        {
            "position_ids": [[4]],
            "slot_mapping": [[7 * 64 + 4]],
            "block_table": [[7]],
            "current_tkv_mask": [5],
            "left_padded_prompt_mask": [0],
        }
    )


def spare_row() -> Step:
    """A row that decodes nothing, beside a real one."""
    return decode_step(
        position_ids=[[0], [69]],
        slot_mapping=[[0], [3 * 64 + 5]],
        block_table=[[0, 0], [2, 3]],
        current_tkv_mask=[65, 70],
        left_padded_prompt_mask=[64, 0],
    )


def rotations(positions: list[list[int]]) -> list[Any]:
    """RoPE's rotations of positions, all frequencies alike."""
    angles = torch.tensor(positions).float()[..., None].expand(-1, -1, 64)
    rows = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1)
    return rows.unflatten(-1, (2, 2)).tolist()


ROTATED_CHUNK = [[*[0] * 64, *range(60), *[0] * 4]]

ALLOWED = {
    "a chunk": chunk_step(),
    "a decode": decode_step(),
    "a lone row": lone_row(),
    "a spare row": spare_row(),
    "a chunk with rotations": chunk_step(position_ids=rotations(ROTATED_CHUNK)),
    "a decode with rotations": decode_step(position_ids=rotations([[2], [900], [0]])),
}

long_table = [[0] * 15 + [7], [0] * 14 + [2, 3], [0] * 13 + [4, 5, 6]]
long_ends = {
    "block_table": long_table,
    "current_tkv_mask": [15 * 64 + 5, 14 * 64 + 70, 13 * 64 + 130],
    "left_padded_prompt_mask": [15 * 64, 14 * 64, 13 * 64],
}

BREACHES: dict[str, tuple[Step, str]] = {
    "a real token in block 0": (
        decode_step(
            slot_mapping=[[4], [3 * 64 + 5], [6 * 64 + 1]],
            block_table=[[0, 0, 0], [0, 2, 3], [4, 5, 6]],
            current_tkv_mask=[133, 134, 130],
        ),
        "a real token at position 132 is written to block 0",
    ),
    "a token in another's block": (
        decode_step(slot_mapping=[[7 * 64 + 4], [6 * 64 + 5], [6 * 64 + 1]]),
        "slot 389 is not position 133",
    ),
    "padding in a real block": (
        chunk_step(block_table=[[8, 9]], slot_mapping=[[*range(512, 640)]]),
        "padding at position 0 is written to block 8",
    ),
    "two tokens in one slot": (
        decode_step(
            slot_mapping=[[7 * 64 + 4], [7 * 64 + 4], [6 * 64 + 1]],
            block_table=[[0, 0, 7], [0, 2, 7], [4, 5, 6]],
            current_tkv_mask=[133, 133, 130],
        ),
        "two tokens are written to one slot",
    ),
    "a hole in a table": (
        decode_step(block_table=[[0, 0, 7], [0, 0, 3], [4, 5, 6]]),
        "a block of a row is block 0",
    ),
    "padding that is no whole block": (
        decode_step(left_padded_prompt_mask=[128, 60, 0]),
        "a row from 60 to 134 does not fit",
    ),
    "a batch beyond the bound": (
        decode_step(**long_ends),
        "3 rows of 966 tokens exceed the bound of 1024",
    ),
    "a row beyond the context": (decode_step(**long_ends), "966 tokens exceed the context of 512"),
    "too many rows": (
        with_cache(
            {
                "position_ids": [[4]] * 5,
                "slot_mapping": [[64 * block + 4] for block in range(1, 6)],
                "block_table": [[block] for block in range(1, 6)],
                "current_tkv_mask": [5] * 5,
                "left_padded_prompt_mask": [0] * 5,
            }
        ),
        "5 rows exceed the batch of 4",
    ),
    "a short chunk": (
        chunk_step(
            position_ids=[[*range(60), *[0] * 4]],
            slot_mapping=[[*range(9 * 64, 10 * 64)]],
            left_padded_prompt_mask=[64],
        ),
        "a step of 64 tokens is neither a chunk of 128 nor a decode",
    ),
    "padded positions": (
        decode_step(position_ids=[[132], [133], [129]]),
        "position 132 of a row after 128 is called 132",
    ),
    "rotations of another step": (
        decode_step(position_ids=rotations([[2], [900]])),
        "the rotations of 3 rows of 1 tokens are (2, 1, 64, 2, 2)",
    ),
    "no rotations": (
        decode_step(position_ids=torch.ones(3, 1, 64, 2, 2).tolist()),
        "a rotation stretches",
    ),
    "rotations on padding": (
        chunk_step(position_ids=rotations([[*range(128)]])),
        "the padding before a row is rotated",
    ),
    "positions on padding": (
        chunk_step(position_ids=[[*range(124), *[0] * 4]]),
        "position 1 of a row after 64 is called 1",
    ),
}
