# SPDX-License-Identifier: Apache-2.0
"""Positions of prompts on three axes are those that Transformers computes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from vllm.multimodal.inputs import PlaceholderRange

from vllm_spyre_mm.multimodal.mm_mappings.mrope_positions import mrope_positions

MODELS: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VLConfig(), Qwen2VLModel),
    "qwen2_5_vl": (Qwen2_5_VLConfig(), Qwen2_5_VLModel),
    "qwen3_vl": (Qwen3VLConfig(), Qwen3VLModel),
}
SECONDS = 0.5
"""Between the grids of a video's time."""


class Prompt:
    """Token ids, kinds of tokens and the items of a prompt that is made piece by piece.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.token_ids: list[int] = []
        self.kinds: list[int] = []
        self.features: list[Any] = []
        self.grids: dict[str, list[list[int]]] = {"image": [], "video": []}

    def text(self, length: int) -> "Prompt":
        self._add([7] * length, 0)
        return self

    def picture(self, rows: int, columns: int) -> "Prompt":
        self._begin("image", [1, rows, columns], rows * columns)
        self._add([self.config.image_token_id] * (rows * columns), 1)
        return self

    def video(self, frames: int, rows: int, columns: int) -> "Prompt":
        """Qwen3-VL writes each frame's time, and marks its beginning and end."""
        config, size = self.config, rows * columns
        apart = config.model_type == "qwen3_vl"
        self._begin("video", [frames, rows, columns], frames * (size + 4 if apart else size))
        for _ in range(frames):
            if apart:
                self._add([7, 8, config.vision_start_token_id], 0)
            self._add([config.video_token_id] * size, 2)
            if apart:
                self._add([config.vision_end_token_id], 0)
        return self

    def _add(self, token_ids: list[int], kind: int) -> None:
        self.token_ids += token_ids
        self.kinds += [kind] * len(token_ids)

    def _begin(self, modality: str, merged: list[int], length: int) -> None:
        merge = self.config.vision_config.spatial_merge_size
        grid = [merged[0], merged[1] * merge, merged[2] * merge]
        self.grids[modality].append(grid)
        data = {f"{modality}_grid_thw": SimpleNamespace(data=torch.tensor(grid))}
        if self.config.model_type == "qwen2_5_vl" and modality == "video":
            data["second_per_grid_ts"] = SimpleNamespace(data=torch.tensor(SECONDS))
        place = PlaceholderRange(offset=len(self.token_ids), length=length)
        self.features.append(SimpleNamespace(modality=modality, data=data, mm_position=place))

    def expected(self, model_class: Any) -> tuple[torch.Tensor, int]:
        """What Transformers computes; its method reads the configuration alone."""
        model = model_class.__new__(model_class)
        model.__dict__["config"] = self.config
        grids = {
            f"{modality}_grid_thw": torch.tensor(found) if found else None
            for modality, found in self.grids.items()
        }
        if self.config.model_type == "qwen2_5_vl":
            grids["second_per_grid_ts"] = torch.tensor([SECONDS] * len(self.grids["video"]))
        positions, deltas = model.get_rope_index(
            torch.tensor([self.token_ids]), torch.tensor([self.kinds]), **grids
        )
        return positions[:, 0], int(deltas[0, 0])


PROMPTS: dict[str, Any] = {
    "a picture": lambda prompt: prompt.text(5).picture(3, 4).text(6),
    "a tall picture at the beginning": lambda prompt: prompt.picture(9, 2).text(3),
    "several pictures": lambda prompt: (
        prompt.text(2).picture(3, 3).text(1).picture(1, 7).text(1).picture(1, 1).text(4)
    ),
    "a video": lambda prompt: prompt.text(4).video(3, 2, 5).text(4),
    "a picture and a video": lambda prompt: (
        prompt.text(4).picture(4, 2).text(1).video(2, 2, 3).text(1)
    ),
}


@pytest.mark.parametrize("name", list(PROMPTS))
@pytest.mark.parametrize("model_type", list(MODELS))
def test_positions_are_those_of_transformers(model_type: str, name: str):
    config, model_class = MODELS[model_type]
    prompt = PROMPTS[name](Prompt(config))
    positions, delta = mrope_positions(config, prompt.token_ids, prompt.features)
    expected, expected_delta = prompt.expected(model_class)
    assert positions.dtype == torch.int64
    assert positions.tolist() == expected.tolist()
    assert delta == expected_delta
    assert delta + len(prompt.token_ids) == positions.max() + 1


@pytest.mark.parametrize("model_type", list(MODELS))
def test_a_picture_is_one_moment_with_rows_and_columns(model_type: str):
    config, _ = MODELS[model_type]
    prompt = Prompt(config).text(2).picture(2, 3).text(2)
    positions, delta = mrope_positions(config, prompt.token_ids, prompt.features)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert delta == -3
