# SPDX-License-Identifier: Apache-2.0
"""RoPE with positions on three axes (time, height, width), as Qwen-VL's decoders have it.

FMS's RoPE has a table by position, which cannot hold every combination of three. Here the rotations
of a step's tokens are computed before the step, on the host, and are an input of the decoder in
place of the positions. So a position may also be any number.
"""

from dataclasses import dataclass
from typing import Any

import torch
from fms.modules.positions import PositionEncoder, RotaryEmbedding
from torch import nn

AXES = 3
"""Time, height and width."""


@dataclass(frozen=True, slots=True)
class MRope:
    """Which axis of the positions turns which frequency of RoPE.

    Attributes:
        sections: number of frequencies of each axis; together half a head.
        interleaved: whether neighbouring frequencies belong to different axes, with those of the
            first axis after the others' end; else each axis has a section of its own.
    """

    sections: tuple[int, ...]
    interleaved: bool

    def axes(self) -> list[int]:
        """The axis of each frequency, from the highest frequency on."""
        if not self.interleaved:
            return [axis for axis, count in enumerate(self.sections) for _ in range(count)]
        axes = [0] * sum(self.sections)
        for axis in range(1, len(self.sections)):
            taken = range(axis, min(AXES * self.sections[axis], len(axes)), AXES)
            for frequency in taken:
                axes[frequency] = axis
        return axes


def mrope_mismatch(mrope: MRope, head_dim: int, name: str = "text_config.") -> str | None:
    """Why sections do not fit heads of a width, or None.

    Args:
        mrope: of the configuration.
        head_dim: width of a head.
        name: put before the property, for the reason.
    """
    sections = list(mrope.sections)
    counts = [mrope.axes().count(axis) for axis in range(AXES)] if len(sections) == AXES else []
    if counts != sections or 2 * sum(sections) != head_dim:
        return f"{name}mrope_section {sections} does not fit heads of {head_dim}"
    return None


class StepRope(PositionEncoder):
    """RoPE whose rotations are given with each step; takes the place of FMS's in a decoder.

    Args:
        original: the module to replace, without scaling.
        mrope: the axis of each frequency.

    Attributes:
        head_dim: width of a head.
    """

    def __init__(self, original: RotaryEmbedding, mrope: MRope) -> None:
        self.head_dim = original.dim
        # On the host although the decoder is built without storage.
        self._frequencies = original.rope_scaling.compute_scaled_freqs("cpu", 1)
        self._axes = torch.tensor(mrope.axes(), device="cpu")
        self.cached_freqs: dict[int, Any] = {}  # FMS's decoders clean their tables up by these
        self.max_seq_len_cached: dict[int, int] = {}

    def compute_freqs_cis(self, device: torch.device, max_seq_len: int) -> None:
        """Do nothing, where FMS's RoPE makes its table."""

    def columns(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Cosines and sines of tokens.

        Args:
            position_ids: int64 ``(3, tokens)``, or ``(1, tokens)`` where all axes are equal.

        Returns:
            fp32 ``(1, tokens, head_dim / 2, 2)``, contiguous: the first columns of the rotations.
        """
        each = position_ids if len(position_ids) == 1 else position_ids[self._axes]
        angles = each.T * self._frequencies
        return torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(0)

    def rotations(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Rotations of tokens, as FMS's tables have them.

        Args:
            position_ids: as for :meth:`columns`.

        Returns:
            fp32 ``(1, tokens, head_dim / 2, 2, 2)``.
        """
        cosines, sines = self.columns(position_ids).unbind(-1)
        return torch.stack((cosines, -sines, sines, cosines), dim=-1).unflatten(-1, (2, 2))

    def adjusted_qk(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_kv_state: Any = None,
        use_cache: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate neighbouring pairs, by the operations of FMS's RoPE.

        Args:
            q: ``(batch, length, heads, head_dim)``.
            k: the same, with the KV heads.
            position_ids: no positions, but rotations: fp32
                ``(batch, length, head_dim / 2, 2, 2)``.
            past_kv_state: not used.
            use_cache: not used.
        """
        assert position_ids is not None, "rotations are given"
        matrices = position_ids.unsqueeze(2)
        query, keys = (
            matrices.mul(part.float().view(*part.shape[:-1], -1, 2).unsqueeze(-2))
            .sum(5)
            .flatten(3)
            .type_as(part)
            for part in (q, k)
        )
        return query, keys


def set_step_rope(base_model: Any, mrope: MRope) -> None:
    """Let an FMS decoder without its head use a :class:`StepRope`, in place."""
    base_model.rot_emb = rope = StepRope(base_model.rot_emb, mrope)
    for block in base_model.layers:
        block.attn.position_encoder = rope


def step_rope_of(blocks: nn.ModuleList) -> StepRope | None:
    """The :class:`StepRope` of a decoder's blocks, None if they take positions."""
    encoders = (getattr(part, "position_encoder", None) for part in blocks.modules())
    return next((each for each in encoders if isinstance(each, StepRope)), None)
