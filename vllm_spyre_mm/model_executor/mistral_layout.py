# SPDX-License-Identifier: Apache-2.0
"""Weights in Mistral's own format (``consolidated*.safetensors``): names, and the order of rows.

Mistral rotates neighbouring elements of a head, Transformers the first half against the second; so
the rows of the matrices that make queries and keys are in another order.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_spyre_mm.model_executor.checkpoint import CheckpointError, WeightFiles, listed
from vllm_spyre_mm.model_executor.models.composition import DECODER, PROJECTOR, TOWER
from vllm_spyre_mm.model_executor.spec import LoadOverrides

MATRICES = {
    "attention.wq": "q_proj",
    "attention.wk": "k_proj",
    "attention.wv": "v_proj",
    "attention.wo": "o_proj",
    "feed_forward.w1": "gate_proj",
    "feed_forward.w2": "down_proj",
    "feed_forward.w3": "up_proj",
}
"""Matrices of a layer, as Mistral and as Transformers calls them."""

BESIDE_LAYERS = {
    "tok_embeddings.": f"{DECODER}.model.embed_tokens.",
    "norm.": f"{DECODER}.model.norm.",
    "output.": f"{DECODER}.lm_head.",
    "vision_encoder.": f"{TOWER}.",
    "pre_mm_projector_norm.": f"{PROJECTOR}.norm.",
    "patch_merger.": f"{PROJECTOR}.patch_merger.",
    "vision_language_adapter.w_in.": f"{PROJECTOR}.linear_1.",
    "vision_language_adapter.w_out.": f"{PROJECTOR}.linear_2.",
}
"""Beginnings of the other names."""

LAYER = re.compile(
    r"^(?P<tower>vision_encoder\.transformer\.)?layers\.(?P<number>\d+)\.(?P<rest>.*)"
)


@dataclass(frozen=True, slots=True)
class MistralLayout:
    """How a model's weights are read from Mistral's own format.

    Attributes:
        head_dim: width of a decoder's head.
        tower_head_dim: width of a head of the vision tower; None without a tower.
    """

    head_dim: int
    tower_head_dim: int | None

    def rename(self, name: str) -> str:
        """The name that Transformers 4 has for a tensor; the same for one that is not known."""
        layer = LAYER.match(name)
        if layer is None:
            for beginning, renamed in BESIDE_LAYERS.items():
                if name.startswith(beginning):
                    return renamed + name.removeprefix(beginning)
            return name
        matrix, dot, end = layer["rest"].rpartition(".")
        if layer["tower"]:
            part = f"{TOWER}.transformer"
            folders = {"attention": "attention", "feed_forward": "feed_forward"}
            norms = {}
        else:
            part = f"{DECODER}.model"
            folders = {"attention": "self_attn", "feed_forward": "mlp"}
            norms = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        if matrix in MATRICES:
            matrix = f"{folders[matrix.partition('.')[0]]}.{MATRICES[matrix]}"
        return f"{part}.layers.{layer['number']}.{norms.get(matrix, matrix)}{dot}{end}"

    def convert(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with its rows as Transformers has them.

        Args:
            name: its renamed name.
            tensor: as it is stored.
        """
        if not name.endswith((".q_proj.weight", ".k_proj.weight")):
            return tensor
        width = self.tower_head_dim if name.startswith(f"{TOWER}.") else self.head_dim
        assert width is not None, "a model without a tower has no tensors of one"
        pairs = tensor.reshape(-1, width // 2, 2, tensor.shape[1])
        return pairs.transpose(1, 2).reshape(tensor.shape)


Converter = Callable[[str, torch.Tensor], torch.Tensor]


def layout_of(
    files: WeightFiles, overrides: LoadOverrides
) -> tuple[Callable[[str], str], Converter | None]:
    """How the names of a checkpoint's tensors become those that FMS's adapter knows.

    Returns:
        What renames them, and what converts them once they are read, by the new name.

    Raises:
        CheckpointError: it is in Mistral's own format, and the model is none of Mistral's.
    """
    if not files.mistral_format:
        return overrides.rename, None
    layout = overrides.mistral_layout
    if layout is None:
        raise CheckpointError(
            f"{files.folder} holds Mistral's own format alone ({listed(files.read)}), which is "
            "read for Mistral and Ministral 3 decoders: convert it to the format of Hugging Face, "
            "or get the repository's model*.safetensors"
        )
    return layout.rename, layout.convert
