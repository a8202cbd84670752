# SPDX-License-Identifier: Apache-2.0
"""FMS's decoders, and which Transformers configurations they compute exactly.

FMS reads part of a configuration and assumes the rest. Each :class:`Decoder` states what it
assumes, so that other models are refused with the property's name, not computed wrongly.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fms.models import granite, llama, ministral3, mistral, qwen3
from fms.models.hf.config_utils import param_builders
from fms.utils.config import ModelConfig
from torch import nn

from vllm_spyre_mm.model_executor.models import granite_moe_hybrid
from vllm_spyre_mm.model_executor.models.qwen2 import Qwen2
from vllm_spyre_mm.model_executor.models.yarn import Ministral3Decoder


@dataclass(frozen=True, slots=True)
class Decoder:
    """One of FMS's decoders.

    Attributes:
        model_class: the FMS model with its head; made from a configuration and a distributed
            strategy.
        config_class: FMS's configuration.
        params: FMS's function that reads the Transformers configuration.
        adapter: FMS's architecture whose adapter reads the checkpoint.
        prefix: prefix that the adapter expects before a decoder's names. An adapter with one takes
            the configuration of the whole model.
        rope_types: the RoPE scalings that it computes.
        biases: the configuration's bias flags that it honours.
        has_head_dim: whether a head's width may differ from ``hidden_size`` / heads.
        pads_heads: whether its adapter pads heads to the card's width.
        padded: what is built in its place where heads are padded, if its own adapter pads none.
        width: the configuration's name of the feed-forward width.
        mismatch: first further property that it would not honour, with a prefix for its name.
        fuses: whether it may have fused projections.
    """

    model_class: Callable[..., nn.Module]
    config_class: Callable[..., ModelConfig]
    params: Callable[[Any], dict[str, Any]]
    adapter: str
    prefix: str = ""
    rope_types: tuple[str, ...] = ("default",)
    biases: tuple[str, ...] = ()
    has_head_dim: bool = True
    pads_heads: bool = False
    padded: "Decoder | None" = None
    width: str = "intermediate_size"
    mismatch: Callable[[Any, str], str | None] = lambda text, name: None
    fuses: bool = True

    def config(self, text: Any, *, tied: bool, head_dim: int | None = None) -> ModelConfig:
        """FMS's configuration for a Transformers configuration of the decoder.

        Args:
            text: the Transformers configuration; :func:`decoder_mismatch` has accepted it.
            tied: whether the LM head is tied to the embedding, by the whole model's configuration.
            head_dim: width that the heads are padded to; None for no padding.
        """
        params = self.params(text)
        params["multiple_of"] = 1  # some of FMS's defaults round the feed-forward width up
        params["tie_heads"] = tied
        # Only training uses the padding token, which may have no row in the embedding.
        params["pad_id"] = -1
        if not self.fuses:
            params["fused_weights"] = False
        if head_dim is not None:
            params["head_dim"] = head_dim
        return self.config_class(**params)


def _llama_params(text: Any) -> dict[str, Any]:
    """FMS's parameters, with the RoPE scaling from where Transformers 5 keeps it."""
    params = param_builders.build_llama_params(text)
    if rope_type(text) == "llama3":
        params["rope_scaling"] = dict(text.rope_parameters)
    return params


def _llama_as_granite_params(text: Any) -> dict[str, Any]:
    """Parameters of the Granite that is a given Llama: no multiplier but the attention's scale."""
    params = param_builders.build_llama_params(text)
    head_dim = head_dim_of(text)
    multipliers = ("embedding_multiplier", "logits_scaling", "residual_multiplier")
    fields = {field.name for field in dataclasses.fields(granite.GraniteConfig)}
    return {name: value for name, value in params.items() if name in fields} | {
        **dict.fromkeys(multipliers, 1.0),
        "attention_multiplier": head_dim**-0.5,
        "head_dim": head_dim,
    }


def _qwen3_params(text: Any) -> dict[str, Any]:
    """FMS's parameters, renamed and restricted to the fields of its configuration."""
    params = param_builders.build_qwen3_embeddings_params(text)
    params["rope_theta"] = params.pop("rope_base")
    fields = {field.name for field in dataclasses.fields(qwen3.Qwen3Config)}
    return {name: value for name, value in params.items() if name in fields}


DECODERS: Mapping[str, Decoder] = {
    "granite": Decoder(
        granite.Granite,
        granite.GraniteConfig,
        param_builders.build_granite_params,
        # The adapter "granite" assumes heads of hidden_size / heads.
        adapter="llava_next",
        prefix="language_model.",
        biases=("mlp_bias",),
        pads_heads=True,
    ),
    "llama": Decoder(
        llama.LLaMA,
        llama.LLaMAConfig,
        _llama_params,
        adapter="llama",
        rope_types=("default", "llama3"),
        biases=("attention_bias", "mlp_bias"),
        has_head_dim=False,
        padded=Decoder(
            granite.Granite,
            granite.GraniteConfig,
            _llama_as_granite_params,
            adapter="llava_next",
            prefix="language_model.",
            biases=("mlp_bias",),
            pads_heads=True,
        ),
    ),
    "mistral": Decoder(
        mistral.Mistral,
        mistral.MistralConfig,
        param_builders.build_mistral_params,
        adapter="mistral",
    ),
    "ministral3": Decoder(
        Ministral3Decoder,
        ministral3.Ministral3TextConfig,
        param_builders.build_ministral3_text_params,
        adapter="mistral",  # that of "ministral3" wants a vision tower
        rope_types=("yarn",),
    ),
    "qwen2": Decoder(
        Qwen2,
        mistral.MistralConfig,
        param_builders.build_mistral_params,
        adapter="mistral",
    ),
    "qwen3": Decoder(
        qwen3.Qwen3,
        qwen3.Qwen3Config,
        _qwen3_params,
        adapter="qwen3",
        fuses=False,
    ),
    "granitemoehybrid": Decoder(
        granite.Granite,
        granite.GraniteConfig,
        granite_moe_hybrid.params,
        adapter=granite_moe_hybrid.ARCHITECTURE,
        prefix="language_model.",
        pads_heads=True,
        width=granite_moe_hybrid.WIDTH,
        mismatch=granite_moe_hybrid.mismatch,
    ),
}
"""The decoders by Transformers' ``model_type``."""


def head_dim_of(text: Any) -> int:
    """Width of a head in a Transformers configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def rope_type(text: Any) -> str:
    """Transformers' name of the RoPE scaling."""
    rope = getattr(text, "rope_parameters", None) or {}
    return rope.get("rope_type") or rope.get("type") or "default"


def decoder_mismatch(text: Any, name: str = "text_config.") -> str | None:
    """First property of a decoder's configuration that FMS would not honour, or None.

    Args:
        text: the Transformers configuration of one of :data:`DECODERS`.
        name: put before each property, for the reason.
    """
    decoder = DECODERS[text.model_type]
    return (
        decoder.mismatch(text, name)
        or width_mismatch(text, name, decoder.width)
        or _attention_mismatch(decoder, text, name)
        or _rope_mismatch(decoder, text, name)
        or _layer_mismatch(decoder, text, name)
    )


def padding_decoder(text: Any) -> Decoder | None:
    """What is built for a decoder whose heads are padded for the card; None if they cannot be.

    Args:
        text: the Transformers configuration; :func:`decoder_mismatch` has accepted it.
    """
    decoder = DECODERS[text.model_type]
    other = decoder if decoder.pads_heads else decoder.padded
    if other is None or _rope_mismatch(other, text, "") or _layer_mismatch(other, text, ""):
        return None
    return other


def width_mismatch(part: Any, name: str, width: str = "intermediate_size") -> str | None:
    """Why FMS would build another feed-forward width, or None: it computes it from a ratio."""
    wanted = getattr(part, width)
    built = int(part.hidden_size * (wanted / part.hidden_size))
    if built != wanted:
        return f"{name}{width} {wanted} would be built as {built}"
    return None


def _attention_mismatch(decoder: Decoder, text: Any, name: str) -> str | None:
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % kv_heads:
        return f"{name}num_attention_heads {heads} is no multiple of its {kv_heads} KV heads"
    if not decoder.has_head_dim and head_dim_of(text) * heads != text.hidden_size:
        return f"{name}head_dim {head_dim_of(text)} is not hidden_size / num_attention_heads"
    window = getattr(text, "sliding_window", None)
    if window is not None and window < text.max_position_embeddings:
        return f"{name}sliding_window {window} is not implemented: attention is to all tokens"
    layer_types = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if layer_types and window is None:
        return f"{name}layer_types has {sorted(layer_types)[0]!r}, which is not implemented"
    return None


def _rope_mismatch(decoder: Decoder, text: Any, name: str) -> str | None:
    if rope_type(text) not in decoder.rope_types:
        return f"{name}rope_type {rope_type(text)!r} is not implemented"
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"{name}partial_rotary_factor {rope['partial_rotary_factor']} is not implemented"
    return None


def _layer_mismatch(decoder: Decoder, text: Any, name: str) -> str | None:
    if text.hidden_act not in ("silu", "swish"):
        return f"{name}hidden_act {text.hidden_act!r} is not implemented"
    for bias in ("attention_bias", "mlp_bias"):
        if getattr(text, bias, False) and bias not in decoder.biases:
            return f"{name}{bias} is not implemented"
    return None
