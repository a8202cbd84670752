# SPDX-License-Identifier: Apache-2.0
"""Releases of PyTorch differ in their own parts; those that are not here are simulated."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch._inductor import config

from tests.torch_releases import oldest_pytorch, pytorch_without_internals
from vllm_spyre_mm.cli.encoder import VisionEncoder
from vllm_spyre_mm.model_executor.cpu import linear, tier, torch_internals
from vllm_spyre_mm.model_executor.cpu.kernels.kernel import Kernel, compile_kernel
from vllm_spyre_mm.multimodal.embedding_choice import EmbeddingChoice


def test_the_installed_release_has_everything() -> None:
    assert torch_internals.why_not_compiled() is None
    assert torch_internals.packs_linears()


def test_what_is_not_there_is_named() -> None:
    with pytorch_without_internals():
        reason = torch_internals.why_not_compiled()
        assert reason is not None
        assert reason.startswith(f"PyTorch {torch.__version__} has no torch._dynamo.convert_frame.")
        assert reason.endswith("convert_frame.moved, torch.no_module.anything")
        assert tier.compiled_for() == "nothing"


VECTORS = """
extern "C" int widest() {
#if defined(__AVX512F__)
  return 512;
#elif defined(__AVX2__)
  return 256;
#else
  return 0;
#endif
}
"""


def widest(march: str) -> int:
    with torch_internals.inductor_settings("x86-64-v4", 512):
        library = torch_internals.load_library(VECTORS, [f"-march={march}"])
    function = library.widest
    function.restype = ctypes.c_int
    return function()


@pytest.mark.parametrize(("march", "bits"), [("x86-64", 0), ("x86-64-v3", 256)])
def test_a_kernel_is_compiled_for_its_own_architecture_in_every_release(
    march: str, bits: int
) -> None:
    """Neither Inductor's architecture nor its flags of vectors have a say."""
    assert widest(march) == bits
    with oldest_pytorch():
        assert widest(march) == bits


def test_a_kernel_of_a_lower_tier_has_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    class Library:
        rope = staticmethod(lambda: 0)

    def load_library(text: str, flags: tuple[str, ...]) -> Library:
        asked.append(flags)
        return Library()

    monkeypatch.setattr(tier, "is_x86", lambda: True)
    monkeypatch.setitem(compile_kernel.__wrapped__.__globals__, "load_library", load_library)
    kernel = Kernel("rope", ("generic",), (torch.float32,), ())
    compile_kernel.__wrapped__(kernel, "avx2", ())
    compile_kernel.__wrapped__(kernel, "avx512_bf16", ())
    assert asked == [
        ("-ffp-contract=fast", "-march=x86-64-v3"),
        ("-ffp-contract=fast", "-march=x86-64-v4", "-mavx512bf16"),
    ]


def test_the_oldest_release_is_told_no_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    before = getattr(config.cpp, "march", None)
    with oldest_pytorch(), torch_internals.inductor_settings("x86-64-v3", 256):
        assert config.cpp.simdlen == 256
        assert getattr(config.cpp, "march", None) == before != "x86-64-v3"
    monkeypatch.setattr(tier, "takes_architecture", lambda: False)
    assert tier.compiled_for() == "the machine at hand"


def test_a_pytorch_without_onednn_keeps_weights_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(linear, "computes_in_bf16", lambda: True)
    assert linear.HostLinear(layer).weight.is_mkldnn
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = linear.HostLinear(layer)
    assert not plain.weight.is_mkldnn
    torch.testing.assert_close(plain(x), layer(x))


def test_an_encoder_runs_where_nothing_can_be_compiled(
    demo_checkpoint: Path, tmp_path: Path
) -> None:
    """The card's path too has its encoder from there."""
    with pytorch_without_internals():
        uncompiled = VisionEncoder(str(demo_checkpoint), backend="inductor")
        picture = uncompiled.process(Image.new("RGB", (60, 40), "red"))
        found = uncompiled.encode([picture], EmbeddingChoice())
    eager = VisionEncoder(str(demo_checkpoint), backend="eager")
    torch.testing.assert_close(found, eager.encode([picture], EmbeddingChoice()))


IMPORTS_OF_THE_CARD = """
import importlib
import sys

import fms.models
import vllm

from vllm_spyre_mm.model_executor.cpu.torch_internals import COMPILER

for module in [importlib.import_module(name) for name in COMPILER]:
    for name in COMPILER[module.__name__]:
        delattr(module, name)

import vllm_spyre_mm.model_executor.card.backend
import vllm_spyre_mm.model_executor.cpu.backend

print("vllm_spyre_mm.model_executor.cpu.shared_graph" in sys.modules)
"""


def test_a_backend_is_imported_without_any_of_them() -> None:
    """The card's above all, which runs with older releases."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_OF_THE_CARD], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]
