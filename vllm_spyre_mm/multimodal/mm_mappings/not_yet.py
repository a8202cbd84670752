# SPDX-License-Identifier: Apache-2.0
"""Architectures that are known and not served yet, each with the reason."""

from collections.abc import Mapping

VIDEO = "video, and images as frames of it"
AUDIO = "audio"
POOLING = "pooling: it gives embeddings, not text"

MISTRAL_FORMAT = (
    "Mistral's own format (params.json): fetch config.json and the files of Hugging Face's "
    "tokenizer and processor too, and do not give --config-format mistral"
)

NOT_YET: Mapping[str, str] = {
    "pixtral": MISTRAL_FORMAT,
    "qwen3_vl_moe": "a mixture of experts",
    "llava_next_video": VIDEO,
    "video_llava": VIDEO,
    "granite_speech": AUDIO,
    "qwen2_audio": AUDIO,
    "voxtral": AUDIO,
    "whisper": AUDIO,
    "clip": POOLING,
    "siglip": POOLING,
    "siglip2": POOLING,
    "roberta": POOLING,
    "xlm-roberta": POOLING,
    "mpnet": POOLING,
    "bamba": "state-space layers, whose state is no KV cache",
    "mixtral": "a mixture of experts",
    "gpt_oss": "a mixture of experts, attention sinks and sliding windows",
    "granite_swa": "sliding windows: attention is to all tokens",
    "gpt_bigcode": "learnt positions, which FMS adds to the embeddings of token ids only",
}
"""By the ``model_type`` of Transformers."""
