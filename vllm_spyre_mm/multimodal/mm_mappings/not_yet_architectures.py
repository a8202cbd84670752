# SPDX-License-Identifier: Apache-2.0
"""The multimodal architectures of vLLM that are not served, each with the reason.

Architectures that are listed by ``model_type`` in :mod:`.not_yet` are left out.
"""

from collections.abc import Mapping
from typing import Any

from vllm_spyre_mm.multimodal.mm_mappings.not_yet import AUDIO, MISTRAL_FORMAT, NOT_YET

EXPERTS = "a mixture of experts"
STATE = "layers whose state is no KV cache"
DECODER = "a decoder of a family that is not among those here"
TOWER = "a vision tower that is not among those here"
PROJECTOR = "a projector that is not among those here"
TOGETHER = "parts put together in a way that no mapping here knows"

NAMES: Mapping[str, str] = {
    EXPERTS: """
        AriaForConditionalGeneration DeepseekOCR2ForCausalLM DeepseekOCRForCausalLM
        DeepseekV41ForCausalLM DeepseekV4ForConditionalGeneration DeepseekVLV2ForCausalLM
        Dots3NoteForCausalLM Ernie4_5_VLMoeForConditionalGeneration
        Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration HfMoondream
        InternS1ProForConditionalGeneration InternS2MobiusForConditionalGeneration
        InternS2PreviewForConditionalGeneration KimiK25ForConditionalGeneration
        KimiK3ForConditionalGeneration KimiVLForConditionalGeneration
        Llama4ForConditionalGeneration MiMoV2OmniForCausalLM
        MiniMaxM3SparseForConditionalGeneration Moondream3ForCausalLM
        MuseSparkForConditionalGeneration Ovis2_6_MoeForCausalLM
        Qwen3OmniMoeForConditionalGeneration Qwen3_5MoeForConditionalGeneration
        Qwen4ExpForConditionalGeneration Step3VLForConditionalGeneration
        Step5ForConditionalGeneration UnlimitedOCRForCausalLM
    """,
    STATE: """
        BailingMoeV3VLForConditionalGeneration Cosmos3EdgeForConditionalGeneration
        Lfm2VlForConditionalGeneration MiniCPMOcrForConditionalGeneration
        MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration
        NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3
        NemotronH_Super_Omni_Reasoning_V3 Qwen3_5ForConditionalGeneration
    """,
    DECODER: """
        Cohere2VisionForConditionalGeneration CohereCompassForConditionalGeneration
        Emu3ForConditionalGeneration Exaone4_5_ForConditionalGeneration GLM4VForCausalLM
        Gemma3ForConditionalGeneration Gemma3nForConditionalGeneration
        Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
        Glm4vForConditionalGeneration GlmOcrForConditionalGeneration
        HunYuanVLForConditionalGeneration Molmo2ForConditionalGeneration MolmoForCausalLM
        MuseGlimmerForConditionalGeneration OpenPanguVLForConditionalGeneration
        PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration Phi3VForCausalLM
        Phi4ForCausalLMV Phi4MMForCausalLM RadioMBartPrefixForCausalLM
    """,
    TOWER: """
        DotsOCRForCausalLM H2OVLChatModel InternS1ForConditionalGeneration InternVLChatModel
        InternVLForConditionalGeneration IsaacForConditionalGeneration
        KeyeForConditionalGeneration KeyeVL1_5ForConditionalGeneration Llama_Nemotron_Nano_VL
        LlavaOnevision2ForConditionalGeneration NVLM_D Ovis Ovis2_5 Ovis2_6ForCausalLM
        QianfanOCRForConditionalGeneration SkyworkR1VChatModel Step3p7ForConditionalGeneration
        StepVLForConditionalGeneration
    """,
    PROJECTOR: """
        Blip2ForConditionalGeneration KananaVForConditionalGeneration MiniCPMO MiniCPMV
    """,
    TOGETHER: """
        Alpamayo2Super BagelForConditionalGeneration BeeForConditionalGeneration
        Cosmos3ForConditionalGeneration Eagle2_5_VLForConditionalGeneration
        LightOnOCRForConditionalGeneration OpenCUAForConditionalGeneration
        RForConditionalGeneration
    """,
    AUDIO: """
        AudioFlamingo3ForConditionalGeneration FireRedASR2ForConditionalGeneration
        FunASRForConditionalGeneration FunAudioChatForConditionalGeneration
        GlmAsrForConditionalGeneration GraniteSpeechForConditionalGeneration
        GraniteSpeechPlusForConditionalGeneration MiDashengLMModel MoonshotKimiaForCausalLM
        MossAudioModel MossTranscribeDiarizeForConditionalGeneration
        Qwen2AudioForConditionalGeneration Qwen2_5OmniForConditionalGeneration Qwen2_5OmniModel
        Qwen3ASRForConditionalGeneration Qwen3ASRRealtimeGeneration UltravoxModel
        VibeVoiceAsrForConditionalGeneration VoxtralForConditionalGeneration
        VoxtralRealtimeGeneration
    """,
    "an encoder-decoder, with attention across": """
        CohereAsrForConditionalGeneration NemotronParseForConditionalGeneration
        WhisperForConditionalGeneration
    """,
    "text by diffusion, many tokens at once": "DiffusionGemmaForBlockDiffusion",
    "actions of a robot, not text": "OpenVLAForActionPrediction",
    MISTRAL_FORMAT: "PixtralForConditionalGeneration",
}
"""By the reason, vLLM's names of the architectures that have it."""

ARCHITECTURES: Mapping[str, str] = {
    architecture: reason for reason, names in NAMES.items() for architecture in names.split()
}
"""The reason by vLLM's name of an architecture."""


def why_not_yet(config: Any) -> str | None:
    """Why a known architecture is not served, or None for one that is not known.

    Args:
        config: the Transformers configuration of a whole model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type: str = getattr(config, "model_type", "")
    if model_type in NOT_YET:
        return NOT_YET[model_type]
    usual = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    names = [*(getattr(config, "architectures", None) or ()), usual]
    return next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
