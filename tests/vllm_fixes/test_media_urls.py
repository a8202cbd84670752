# SPDX-License-Identifier: Apache-2.0
"""Pictures come from where they may come from; a URL that cannot be used is the client's error."""

import asyncio
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_spyre_mm.vllm_fixes import media


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """As the platform's entry point does it; more than once is harmless."""
    media.install()


def picture() -> bytes:
    """A file of 40 by 30 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures() -> Iterator[tuple[str, list[str]]]:
    """The address of a server of pictures by one of its names, and the paths that it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{port}/picture.png")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture())

        def log_message(self, *_: Any):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{port}", asked
        server.shutdown()
        thread.join()


def fetched(url: str, later: bool, **limits: Any) -> Any:
    """A picture, through the connector of a server (``later``) or of ``LLM.chat``."""
    connector = MEDIA_CONNECTOR_REGISTRY.load("http", **limits)
    if not later:
        return connector.fetch_image(url)
    connector.connection.reuse_client = False  # each call has an event loop of its own
    return asyncio.run(connector.fetch_image_async(url))


BOTH = pytest.mark.parametrize("later", [False, True], ids=["LLM", "server"])


@BOTH
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("file:///etc/hostname", "Cannot load local files"),
        ("data:image/png,plain", "Only base64 data URLs"),
        ("http://127.0.0.1:1/picture.png", "cannot be used: .*127.0.0.1"),
    ],
)
def test_a_url_that_cannot_be_used_is_the_clients_error(
    url: str, sentence: str, later: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    with pytest.raises(VLLMUnprocessableEntityError, match=sentence):
        fetched(url, later)


@BOTH
def test_local_files_come_from_the_allowed_folder_alone(tmp_path: Path, later: bool):
    allowed, other = tmp_path / "allowed", tmp_path / "allowed too"
    for folder in (allowed, other):
        folder.mkdir()
        (folder / "picture.png").write_bytes(picture())
    (allowed / "link.png").symlink_to(other / "picture.png")
    limits = {"allowed_local_media_path": str(allowed)}
    assert fetched((allowed / "picture.png").as_uri(), later, **limits).size == (40, 30)
    for path in (other / "picture.png", allowed / "link.png", allowed / "../allowed too/x.png"):
        with pytest.raises(ValueError, match="must be a subpath"):
            fetched(f"file://{path}", later, **limits)
    with pytest.raises(VLLMUnprocessableEntityError, match="cannot be used"):
        fetched((allowed / "none.png").as_uri(), later, **limits)


@BOTH
def test_pictures_come_from_the_allowed_domains_alone(pictures: tuple[str, list[str]], later: bool):
    address, asked = pictures
    limits = {"allowed_media_domains": ["localhost"]}
    assert fetched(f"{address}/picture.png", later, **limits).size == (40, 30)
    port = address.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost@127.0.0.1", "localhost.", "[::1]", "127.1"):
        with pytest.raises(ValueError, match="must be from one of the allowed domains"):
            fetched(f"http://{host}:{port}/picture.png", later, **limits)
    assert asked == ["/picture.png"]


@BOTH
def test_a_redirect_does_not_lead_out_of_the_allowed_domains(
    pictures: tuple[str, list[str]], later: bool
):
    address, asked = pictures
    with pytest.raises(ValueError, match="Failed to load image"):
        fetched(f"{address}/elsewhere", later, allowed_media_domains=["localhost"])
    assert asked == ["/elsewhere"]
    assert fetched(f"{address}/elsewhere", later).size == (40, 30)
