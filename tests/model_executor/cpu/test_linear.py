# SPDX-License-Identifier: Apache-2.0
"""Linear layers of the host compute what nn.Linear does, and hold a weight once."""

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fms.modules.feedforward import FeedForwardBlock, GatedLinearUnit
from torch import nn
from torch._dynamo.utils import counters

from tests.tiers import VECTOR_TIERS, on_distinct_tiers, on_vector_tiers
from vllm_spyre_mm.config import CpuTier
from vllm_spyre_mm.model_executor.cpu.kernels.tiled_linear import is_tiled
from vllm_spyre_mm.model_executor.cpu.linear import (
    HostLinear,
    HostPatches,
    HostSwiGLU,
    replace_linears,
)

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
SHAPES = [(7, 48), (1, 5, 48), (3, 1, 48), (1, 1, 48)]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = DTYPES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
def test_it_computes_what_the_layer_does(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...], approximate: str | None
):
    linear = nn.Linear(48, 80, bias=bias, dtype=dtype)
    gelu = None if approximate is None else nn.GELU(approximate)
    x = torch.randn(shape, dtype=dtype)
    expected = linear(x) if gelu is None else gelu(linear(x))
    assert_close(HostLinear(linear, gelu)(x), expected)


@on_distinct_tiers
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_pytorch_without_onednn_takes_its_plain_layer(
    tier: CpuTier, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    """Simulated: none of the operators of ``mkldnn`` is there."""
    linear = nn.Linear(64, 80, dtype=dtype)
    x = torch.randn(3, 64, dtype=dtype)
    expected = nn.functional.gelu(linear(x))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    host = HostLinear(linear, nn.GELU(), compiled=compiled)
    assert not host.weight.is_mkldnn
    assert_close(host(x), expected)


@on_distinct_tiers
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33])
@pytest.mark.parametrize(
    ("width", "outputs"), [(64, 80), (96, 200), (1024, 70), (64, 47), (48, 64), (64, 16)]
)
def test_a_weight_that_stays_in_rows_computes_the_same(
    tier: CpuTier, dtype: torch.dtype, bias: bool, rows: int, width: int, outputs: int
):
    """With the kernel of few rows, and with oneDNN beyond them or for another width."""
    linear = nn.Linear(width, outputs, bias=bias, dtype=dtype)
    kept = HostLinear(linear, compiled=True, tied=True)
    if tier in VECTOR_TIERS and dtype == torch.bfloat16:
        assert kept.weight.data_ptr() == linear.weight.data_ptr()
    x = torch.randn(1, rows, width, dtype=dtype)
    assert_close(kept(x), linear(x))
    assert_close(kept(x[:, -1:]), linear(x[:, -1:]))


# One step, one depth, two, and rows that are packed in parts; with and without tails.
WIDTHS = [30, 32, 576, 588, 1152, 1170]
OUTPUTS = [7, 32, 80, 300]


@on_distinct_tiers
@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
@pytest.mark.parametrize("rows", [1, 5, 32, 33, 300])
@pytest.mark.parametrize(("width", "outputs"), [*product(WIDTHS, OUTPUTS), (4304, 1152)])
def test_a_tiled_weight_computes_the_same(
    tier: CpuTier, width: int, outputs: int, rows: int, approximate: str | None
):
    """Sums are in fp32 and rounded once: nothing is further off than a rounding of the result."""
    linear = nn.Linear(width, outputs, bias=rows % 2 == 1, dtype=torch.bfloat16)
    gelu = nn.Identity() if approximate is None else nn.GELU(approximate)
    x = 5 * torch.randn(rows, width, dtype=torch.bfloat16)
    expected = gelu(linear.float()(x.float()))
    tiled = HostLinear(
        linear.bfloat16(), gelu if isinstance(gelu, nn.GELU) else None, compiled=True
    )
    assert is_tiled(tiled.weight) == (tier in VECTOR_TIERS)
    torch.testing.assert_close(tiled(x).float(), expected, rtol=2**-7, atol=2**-8)


@pytest.mark.usefixtures("tier")
@on_vector_tiers
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 33, 300])
@pytest.mark.parametrize(("width", "hidden"), [(32, 16), (64, 100), (1184, 300)])
def test_the_gates_of_a_unit_are_computed_with_it(width: int, hidden: int, rows: int, bias: bool):
    unit = GatedLinearUnit(
        width,
        hidden / width,
        activation_fn=nn.SiLU(),
        p_dropout=0.0,
        use_bias=bias,
    ).bfloat16()
    x = 5 * torch.randn(1, rows, width, dtype=torch.bfloat16)
    gates, values = unit.wg1_fused.float()(x.float()).chunk(2, dim=-1)
    expected = unit.w2.float()((F.silu(gates) * values).bfloat16().float())
    model = nn.Sequential(unit.bfloat16())
    replace_linears(model, compiled=True)
    assert isinstance(model[0], HostSwiGLU)
    torch.testing.assert_close(model(x).float(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU()])
def test_a_gated_unit_without_kernels_computes_the_same(activation: nn.Module):
    unit = GatedLinearUnit(64, 2, activation_fn=activation, p_dropout=0.0).bfloat16()
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    expected = unit(x)
    model = nn.Sequential(unit)
    replace_linears(model, compiled=isinstance(activation, nn.GELU))
    assert type(model[0]) is GatedLinearUnit
    assert_close(model(x), expected)


@on_distinct_tiers
@pytest.mark.usefixtures("tier")
def test_no_row_and_no_output_disturbs_another():
    """What lies beyond the ends of rows, outputs and inputs is not computed with."""
    linear = nn.Linear(50, 40, dtype=torch.bfloat16)
    tiled = HostLinear(linear, compiled=True)
    memory = torch.full((100, 50), torch.nan, dtype=torch.bfloat16)
    memory[10:47] = torch.randn(37, 50)
    assert_close(tiled(memory[10:47]), linear(memory[10:47]))
    result = tiled(memory)
    assert result[:10].isnan().all()
    assert result[47:].isnan().all()
    assert_close(result[10:47], linear(memory[10:47]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_of_a_sequence_is_taken(dtype: torch.dtype):
    """The head gets the last positions of a longer tensor."""
    linear = nn.Linear(48, 80, dtype=dtype)
    x = torch.randn(1, 9, 48, dtype=dtype)[:, -2:]
    assert_close(HostLinear(linear)(x), linear(x))


class Model(nn.Module):
    """An embedding, a feed-forward block of FMS, and a head that is tied to the embedding."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 48, dtype=dtype)
        self.block = FeedForwardBlock(48, activation_fn=nn.GELU("tanh"), p_dropout=0.0).to(dtype)
        self.head = nn.Linear(48, 80, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embedding(token_ids)))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_layers_of_a_model_are_replaced(dtype: torch.dtype, compiled: bool):
    model = Model(dtype)
    token_ids = torch.tensor([[3, 1, 79]])
    hidden = model.embedding(token_ids)
    first, second = model.block.w1, model.block.w2
    expected = F.linear(second(F.gelu(first(hidden), approximate="tanh")), model.embedding.weight)
    replace_linears(model, compiled=compiled)
    assert not any(isinstance(part, nn.Linear | nn.GELU) for part in model.modules())
    assert_close(model(token_ids), expected)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_cut_as_a_convolution_does(dtype: torch.dtype, bias: bool, compiled: bool):
    """Pixels that fill no patch are left out; a tile's patches lie one after the other."""
    model = nn.Sequential(nn.Conv2d(3, 64, 14, 14, bias=bias, dtype=dtype))
    pixels = torch.randn(2, 3, 14 * 3 + 5, 14 * 4 + 1, dtype=dtype)
    expected = model(pixels)
    replace_linears(model, compiled=compiled)
    assert isinstance(model[0], HostPatches)
    assert model[0].weight.dtype == dtype
    patches = model(pixels)
    assert_close(patches, expected)
    assert patches.flatten(2).transpose(1, 2).is_contiguous()


def test_a_convolution_whose_patches_overlap_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    replace_linears(model)
    assert type(model[0]) is nn.Conv2d


def test_the_weight_of_a_layer_is_held_once():
    model = Model(torch.bfloat16)
    replace_linears(model)
    for name, parameter in model.named_parameters():
        wanted = name.endswith("weight") and not name.startswith("embedding")
        assert parameter.is_mkldnn == wanted, name


@on_vector_tiers
@pytest.mark.usefixtures("tier")
def test_kernels_hold_a_tied_head_once_and_other_weights_tiled():
    model = Model(torch.bfloat16)
    replace_linears(model, compiled=True)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert is_tiled(model.block.w1.weight)
    assert is_tiled(model.block.w2.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph_serves_every_layer(dtype: torch.dtype):
    torch._dynamo.reset()
    counters.clear()
    blocks = [FeedForwardBlock(48, activation_fn=nn.GELU(), p_dropout=0.0).to(dtype) for _ in "ab"]
    for block in blocks:
        replace_linears(block)
        eager = block.forward
        compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (4, 9):
            x = torch.randn(1, length, 48, dtype=dtype)
            assert torch.equal(compiled(x), eager(x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 3, 48), (2, 5, 48), (1, 48)])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_operator_is_what_its_schema_says(
    shape: tuple[int, ...], activation: str | None, compiled: bool
):
    dtype = torch.bfloat16 if compiled else torch.float32
    linear = HostLinear(nn.Linear(48, 70, dtype=dtype), compiled=compiled)
    torch.library.opcheck(
        torch.ops.spyre_mm.linear.default,
        (torch.randn(shape, dtype=dtype), linear.weight, linear.bias, 70, activation),
    )
