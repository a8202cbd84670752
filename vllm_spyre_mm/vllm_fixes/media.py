# SPDX-License-Identifier: Apache-2.0
"""Makes media that cannot be used the client's error, not the server's, and not a black picture.

Leans on: what loads media from URLs and from bytes over HTTP is the class that
``MEDIA_CONNECTOR_REGISTRY`` has under the name ``http``, unless ``VLLM_MEDIA_CONNECTOR`` chooses
another; the classes that are extended by :mod:`vllm_spyre_mm.vllm_fixes.media_connector`.
"""

from types import ModuleType

from vllm_spyre_mm.log import get_logger
from vllm_spyre_mm.upstream.contract import require_attributes, require_methods
from vllm_spyre_mm.upstream.module_loading import when_loaded
from vllm_spyre_mm.vllm_fixes.fault import Fault

logger = get_logger(__name__)

FAULT = Fault(
    "vLLM answers HTTP 500 or 501, and closes the connection, for most of what its libraries raise "
    "for damaged media and for URLs that cannot be used; it serves a picture that ends early as "
    "black, and a video of which frames are missing; and it checks the domain of a URL, not where "
    "that redirects to.",
    seen_in="0.32.0",
)
REPLACED = ()

NAME = "http"
"""Of vLLM's own connector, in its registry and in ``VLLM_MEDIA_CONNECTOR``."""


def install() -> None:
    """Register the platform's connector in place of vLLM's as soon as that exists."""
    when_loaded("vllm.multimodal.media.connector", _register_connector)


def _register_connector(module: ModuleType) -> None:
    require_attributes(module, ("MEDIA_CONNECTOR_REGISTRY", "MediaConnector"))
    connector, registry = module.MediaConnector, module.MEDIA_CONNECTOR_REGISTRY
    loading = ("url", "media_io", "fetch_timeout")
    require_methods(
        connector,
        {
            "__init__": ("connection", "allowed_media_domains"),
            "load_from_url": loading,
            "load_from_url_async": loading,
            "fetch_video": ("video_url", "video_processor"),
            "fetch_video_async": ("video_url", "video_processor"),
            "fetch_image_embedding": ("data",),
            "fetch_image_embedding_async": ("data",),
            "fetch_video_embedding": ("data",),
            "fetch_video_embedding_async": ("data",),
        },
    )
    check_bases()

    from vllm_spyre_mm.vllm_fixes.media_connector import CheckedMediaConnector

    registered = registry.name2class.get(NAME)
    if registered is connector:
        registry.register(NAME)(CheckedMediaConnector)
    elif registered is not CheckedMediaConnector:
        logger.warning("media are loaded by another plugin's connector, %s", registered)


def check_bases() -> None:
    """Check what the platform's connector loads media with.

    Raises:
        UnsupportedVllmError: one of vLLM's classes is not as expected.
    """
    from vllm import connections
    from vllm.multimodal.media import image, video
    from vllm.multimodal.video import VideoLoader

    require_attributes(connections, ("HTTPConnection", "global_http_connection"))
    asking = ("url", "allow_redirects")
    require_methods(
        connections.HTTPConnection, {"get_response": asking, "get_async_response": asking}
    )
    require_attributes(image, ("ImageMediaIO", "ImageEmbeddingMediaIO"))
    for media_io in (image.ImageMediaIO, image.ImageEmbeddingMediaIO):
        require_methods(media_io, {"load_bytes": ("data",)})
    require_attributes(image.ImageMediaIO, ("_convert_image_mode",))
    require_attributes(video, ("VideoMediaIO",))
    require_methods(
        video.VideoMediaIO,
        {
            "__init__": ("image_io", "num_frames"),
            "load_bytes": ("data",),
            "load_base64": ("media_type", "data"),
        },
    )
    require_methods(
        VideoLoader,
        {
            "compute_frames_index_to_sample": ("source", "target"),
            "read_frames": ("cap", "frame_idx"),
        },
    )
