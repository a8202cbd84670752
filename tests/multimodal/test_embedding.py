# SPDX-License-Identifier: Apache-2.0
"""What a request may choose of its embedding, and what each choice gives."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange
from vllm.sampling_params import SamplingParams

from vllm_spyre_mm.config import SpyreSettings
from vllm_spyre_mm.multimodal.embedding import MMEmbeddingInfo, assemble, item_sizes
from vllm_spyre_mm.multimodal.embedding_choice import (
    EXTRA_ARG,
    EmbeddingChoice,
    ItemSize,
    choice_of,
    parse_choice,
)
from vllm_spyre_mm.multimodal.feature_layout import FeatureGrid, FeatureLayout
from vllm_spyre_mm.multimodal.pooling import (
    EmbeddingFault,
    EmbeddingOverflowError,
    choose_levels,
    convert,
    pool,
)
from vllm_spyre_mm.payload import decode_mm_embedding, encode_mm_embedding

ON = SpyreSettings(enable_return_mm_embedding=True)
OPT_IN = SpyreSettings(enable_return_mm_embedding=True, return_mm_embedding_by_default=False)
OFF = SpyreSettings()

# A base tile of 2 x 2 and tiles of 2 rows and 3 columns, a newline after each row.
LAYOUT = FeatureLayout(12, FeatureGrid(0, 2, 2, 2), FeatureGrid(4, 2, 3, 4))
BASE_ONLY = FeatureLayout(4, FeatureGrid(0, 2, 2, 2))


def params(value: Any = None) -> SamplingParams:
    return SamplingParams(extra_args=None if value is None else {EXTRA_ARG: value})


def features(count: int, width: int = 3) -> torch.Tensor:
    """Each row's first element is its number."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    rows[:, 0] = torch.arange(count)
    return rows


# -- anything at all -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "modalities": st.none() | st.lists(st.sampled_from(["image", "video"]), max_size=3),
    "pooling": st.sampled_from(["raw", "image", "frame", "base", "grid"]),
    "levels": st.sampled_from(["input", "all", "none"]),
    "grid": st.none() | st.lists(st.integers(-1, 66), min_size=1, max_size=3),
    "newlines": st.booleans(),
    "dtype": st.sampled_from(["auto", "float32", "float16", "bfloat16", "int8", "int4"]),
    "generate": st.booleans(),
    "encoding_format": st.sampled_from(["base64", "float", "hex"]),
    "max_bytes": st.none() | st.integers(-1),
}
CHOICES = st.fixed_dictionaries({}, optional={name: VALUES[name] | JSON for name in VALUES})


@given(JSON | CHOICES | st.dictionaries(st.sampled_from(sorted(VALUES)) | st.text(), JSON))
def test_any_json_is_a_choice_or_refused(value: Any):
    """As a client writes it, and as vLLM hands it on."""
    try:
        choice = parse_choice(value)
    except VLLMValidationError as error:
        refused = str(error)
        assert refused.startswith("return_mm_embedding ")
        return
    if choice is None:
        assert not value
        return
    assert parse_choice(choice.model_dump(mode="json")) == choice
    assert parse_choice(msgspec.json.decode(choice.model_dump_json())) == choice
    assert (choice.pooling == "grid") == (choice.grid is not None)
    assert choice.max_bytes is None or choice.max_bytes > 0


@st.composite
def layouts(draw: st.DrawFn) -> FeatureLayout:
    """Of a picture with tiles or without, or of a video."""
    down, across = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    base = FeatureGrid(0, down, across, across)
    frames = draw(st.integers(1, 4))
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    if frames > 1 or not rows or not columns:
        return FeatureLayout(frames * down * across, base, frames=frames)
    fine = FeatureGrid(down * across, rows, columns, columns + 1)
    return FeatureLayout(down * across + rows * (columns + 1), base, fine)


@given(CHOICES, layouts(), st.integers(0, 3))
def test_every_choice_is_served_for_every_layout(value: Any, layout: FeatureLayout, levels: int):
    """As many rows and bytes as were promised, and no number that is not of the item."""
    count = layout.num_features
    assert sorted([*layout.places().tolist(), *layout.newlines()]) == list(range(count))
    try:
        choice = parse_choice(value)
    except VLLMValidationError:
        return
    assert choice is not None
    whole = torch.arange(1.0, count + 1).unsqueeze(1).expand(count, 2 * (1 + levels))
    specs = [feature_spec("a", 0)] * 2
    choice = choice.model_copy(update={"max_bytes": None})
    found, info = assemble([whole, whole], specs, [layout] * 2, choice, 2)
    sizes = [ItemSize(count, layout.frames)] * 2
    dropped = 0 if choice.newlines or choice.pooling != "raw" else 2 * len(layout.newlines())
    assert len(found) == choice.num_rows(sizes) - dropped
    assert info.levels == (levels if choice.levels == "all" else 0)
    assert found.shape[1] == 2 * (1 + info.levels)
    promised = choice.num_bytes(sizes, 2, 2 * (1 + levels), "float32")
    assert found.nbytes == promised - dropped * found[0].nbytes
    assert [(item.start, item.end) for item in info.items] == [
        (0, len(found) // 2),
        (len(found) // 2, len(found)),
    ]
    shown = decode_mm_embedding(encode_mm_embedding(found, info, "base64")).float()
    assert shown.shape == found.shape
    assert shown.min() > 0.9
    assert shown.max() < count * 1.01


# -- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 1, {}])
def test_asking_without_more_gives_the_rows_as_merged(value: Any):
    assert parse_choice(value) == EmbeddingChoice()


@pytest.mark.parametrize("value", [False, 0])
def test_declining(value: Any):
    assert parse_choice(value) is None


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("true", "must be true, false or an object, not str"),
        (2, "not int"),
        ([], "not list"),
        ({"pooling": "median"}, "pooling"),
        ({"dtype": "float64"}, "dtype"),
        ({"newline": True}, "newline"),
        ({"newlines": 1}, "newlines"),
        ({"grid": [2, 2]}, "with pooling 'grid' and only there"),
        ({"pooling": "grid"}, "with pooling 'grid' and only there"),
        ({"pooling": "grid", "grid": [0, 2]}, "1 to 64"),
        ({"pooling": "grid", "grid": [2, 65]}, "1 to 64"),
        ({"pooling": "grid", "grid": [2]}, "grid"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"levels": 1}, "levels"),
        ({"levels": "first"}, "levels"),
        ({"modalities": []}, "modalities"),
        ({"modalities": "image"}, "modalities"),
        ({"modalities": [1]}, "modalities"),
    ],
    ids=str,
)
def test_what_there_is_not_is_refused_by_name(value: Any, named: str):
    with pytest.raises(VLLMValidationError, match=EXTRA_ARG) as error:
        parse_choice(value)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("settings", "value", "wanted"),
    [
        (ON, None, True),
        (ON, False, False),
        (ON, True, True),
        (OPT_IN, None, False),
        (OPT_IN, True, True),
        (OFF, None, False),
        (OFF, False, False),
    ],
)
def test_who_gets_one(settings: SpyreSettings, value: Any, wanted: bool):
    assert (choice_of(params(value), settings) is not None) is wanted


def test_asking_an_engine_that_was_started_without_it():
    with pytest.raises(VLLMValidationError, match="started without it: start it with"):
        choice_of(params(True), OFF)


# -- pooling ---------------------------------------------------------------------------------------


def test_raw_is_what_was_merged():
    rows = features(12)
    assert pool(rows, LAYOUT, EmbeddingChoice()) is rows


def test_rows_that_end_a_row_of_tiles_can_be_left_out():
    assert LAYOUT.newlines() == [7, 11]
    kept = pool(features(12), LAYOUT, EmbeddingChoice(newlines=False))
    assert kept[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]


def test_the_mean_of_an_image_leaves_them_out():
    (row,) = pool(features(12), LAYOUT, EmbeddingChoice(pooling="image"))
    assert row[0] == pytest.approx(sum((0, 1, 2, 3, 4, 5, 6, 8, 9, 10)) / 10)


def test_the_mean_of_the_base_tile():
    (row,) = pool(features(12), LAYOUT, EmbeddingChoice(pooling="base"))
    assert row[0] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("layout", "grid", "expected"),
    [
        (LAYOUT, (1, 3), [6, 7, 8]),
        (LAYOUT, (2, 1), [5, 9]),
        (LAYOUT, (2, 3), [4, 5, 6, 8, 9, 10]),
        (BASE_ONLY, (1, 2), [1, 2]),
        (BASE_ONLY, (1, 1), [1.5]),
    ],
)
def test_means_over_a_grid_of_the_finest_features(
    layout: FeatureLayout, grid: tuple[int, int], expected: list[float]
):
    choice = EmbeddingChoice(pooling="grid", grid=grid)
    rows = pool(features(layout.num_features), layout, choice)
    assert rows[:, 0].tolist() == pytest.approx(expected)
    assert choice.num_rows([ItemSize(layout.num_features)]) == len(rows)


VIDEO = FeatureLayout(12, FeatureGrid(0, 2, 2, 2), frames=3)
"""Three frames of 2 x 2."""


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"pooling": "frame"}, [1.5, 5.5, 9.5]),
        ({"pooling": "image"}, [5.5]),
        ({"pooling": "base"}, [5.5]),
        ({"pooling": "grid", "grid": (1, 2)}, [5.0, 6.0]),
        ({"newlines": False}, list(range(12))),
    ],
    ids=str,
)
def test_rows_of_a_video(choice: dict[str, Any], expected: list[float]):
    rows = pool(features(12), VIDEO, EmbeddingChoice(**choice))
    assert rows[:, 0].tolist() == pytest.approx(expected)
    assert VIDEO.base_places()[2].tolist() == [[8, 9], [10, 11]]


@pytest.mark.parametrize("layout", [LAYOUT, BASE_ONLY])
def test_an_image_is_one_frame(layout: FeatureLayout):
    rows = features(layout.num_features)
    frame = pool(rows, layout, EmbeddingChoice(pooling="frame"))
    assert torch.equal(frame, pool(rows, layout, EmbeddingChoice(pooling="image")))


# -- levels ----------------------------------------------------------------------------------------


def test_the_columns_of_the_input_come_first():
    wide = features(12, 9)
    assert choose_levels(wide, 3, EmbeddingChoice()) is wide
    assert torch.equal(choose_levels(wide, 3, EmbeddingChoice(levels="input")), wide[:, :3])


def test_int8_has_a_scale_for_each_level():
    """A level of large numbers takes nothing from the others."""
    exact = features(50, 12) * torch.tensor([1.0, 1e4, 1e-4]).repeat_interleave(4)
    specs, choice = [feature_spec("a", 0)], EmbeddingChoice(dtype="int8")
    rows, info = assemble([exact], specs, [None], choice, 4)
    assert info.scales is not None
    assert info.scales.shape == (50, 3)
    for encoding in ("float", "base64"):
        payload = encode_mm_embedding(rows, info, encoding)  # type: ignore[arg-type]
        off = (decode_mm_embedding(payload) - exact).view(50, 3, 4).abs()
        assert (off <= exact.view(50, 3, 4).abs().amax(dim=2, keepdim=True) / 253).all()


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_chosen_dtype(name: str):
    rows, scales = convert(features(5), name)
    assert rows.dtype == getattr(torch, name)
    assert scales is None


@pytest.mark.parametrize(
    ("dtype", "encoder", "value", "fits"),
    [
        ("float16", torch.bfloat16, 65_536.0, "bfloat16"),
        ("float16", torch.float32, -1e20, "bfloat16"),
        ("float16", torch.float32, 3.4e38, "float32"),
        ("bfloat16", torch.float32, 3.4e38, "float32"),
    ],
)
def test_a_dtype_that_would_overflow_is_refused_with_one_that_fits(
    dtype: str, encoder: torch.dtype, value: float, fits: str
):
    rows = torch.zeros(3, 4, dtype=encoder)
    rows[1, 2] = value
    with pytest.raises(EmbeddingOverflowError, match=f"which {dtype} cannot hold") as error:
        convert(rows, dtype)
    assert str(error.value).endswith(f"choose dtype {fits!r}")
    kept, _ = convert(rows, fits)
    assert kept.isfinite().all()
    small, scales = convert(rows, "int8")
    assert scales is not None
    assert (small * scales.unsqueeze(1)).isfinite().all()


def test_the_largest_value_of_a_dtype_does_not_overflow():
    rows = torch.tensor([[65_504.0, -65_504.0]])
    assert convert(rows, "float16")[0].tolist() == rows.tolist()


def test_int8_is_off_by_half_a_scale_at_most():
    exact = features(50, 64) * torch.logspace(-6, 6, 50).unsqueeze(1)
    exact[7] = 0
    rows, scales = convert(exact, "int8")
    assert rows.dtype == torch.int8
    assert scales is not None
    error = (rows.float() * scales.unsqueeze(1) - exact).abs()
    assert (error <= scales.unsqueeze(1) / 2 * 1.0001).all()
    assert (scales <= exact.abs().amax(dim=1) / 127 * 1.0001).all()


# -- the whole -------------------------------------------------------------------------------------


def feature_spec(name: str, offset: int, modality: str = "image") -> Any:
    position = PlaceholderRange(offset=offset, length=12)
    return SimpleNamespace(
        modality=modality, mm_hash=name, identifier="id", mm_position=position, data=None
    )


def test_items_count_within_their_modality():
    specs = [feature_spec(kind, 0, kind) for kind in ("video", "image", "video")]
    _, info = assemble([features(12)] * 3, specs, [VIDEO, LAYOUT, VIDEO], EmbeddingChoice(), 3)
    assert [(item.modality, item.index) for item in info.items] == [
        ("video", 0),
        ("image", 0),
        ("video", 1),
    ]


def test_the_size_is_that_of_what_is_returned():
    specs = [feature_spec(kind, 0, kind) for kind in ("video", "image")]
    choice = EmbeddingChoice(modalities=("video",), pooling="frame")
    assert item_sizes(choice, specs, lambda _: VIDEO) == [ItemSize(12, 3)]
    assert item_sizes(choice, specs, lambda _: None) == [ItemSize(12, 1)]
    assert item_sizes(EmbeddingChoice(), specs, lambda _: VIDEO) == [ItemSize(12)] * 2
    assert choice.num_bytes([ItemSize(12, 3)], 5, 15, "bfloat16") == 3 * 15 * 2
    alone = choice.model_copy(update={"levels": "input"})
    assert alone.num_bytes([ItemSize(12, 3)], 5, 15, "bfloat16") == 3 * 5 * 2


def test_an_embedding_whose_frames_were_not_known_is_held_to_its_bound():
    """As when the video was sent before, and the front end keeps nothing of it."""
    choice = EmbeddingChoice(pooling="frame", max_bytes=2 * 12)
    spec = feature_spec("a", 0, "video")
    assert choice.num_bytes(item_sizes(choice, [spec], lambda _: None), 3, 3, "float32") == 12
    with pytest.raises(EmbeddingFault, match="has 3 rows and 36 bytes, more than the limit of 24"):
        assemble([features(12)], [spec], [VIDEO], choice, 3)


def test_which_rows_are_which():
    parts = [features(12), features(4)]
    specs = [feature_spec("first", 3), feature_spec("second", 40)]
    rows, info = assemble(parts, specs, [LAYOUT, BASE_ONLY], EmbeddingChoice(newlines=False), 3)
    first, second = info.items
    assert (first.start, first.end, second.start, second.end) == (0, 10, 10, 14)
    assert (first.offset, second.offset) == (3, 40)
    assert (first.content_hash, second.content_hash) == ("first", "second")
    assert torch.equal(rows[second.start : second.end], parts[1])
    assert first.layout is LAYOUT


def test_the_embedding_has_memory_of_its_own():
    parts = [features(12)]
    rows, _ = assemble(parts, [feature_spec("a", 0)], [LAYOUT], EmbeddingChoice(), 3)
    rows.zero_()
    assert parts[0].any()


def test_means_have_the_dtype_of_the_features():
    parts = [features(12).bfloat16()]
    choice = EmbeddingChoice(pooling="image")
    rows, _ = assemble(parts, [feature_spec("a", 0)], [LAYOUT], choice, 3)
    assert rows.dtype == torch.bfloat16


@pytest.mark.parametrize("encoding", ["base64", "float"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_json_and_back(encoding: Any, dtype: str):
    choice = EmbeddingChoice(dtype=dtype)  # type: ignore[arg-type]
    exact = features(12)
    rows, info = assemble([exact], [feature_spec("a", 0)], [LAYOUT], choice, 3)
    payload = msgspec.json.decode(msgspec.json.encode(encode_mm_embedding(rows, info, encoding)))
    decoded = decode_mm_embedding(payload)
    if dtype == "int8":
        assert isinstance(info, MMEmbeddingInfo)
        assert info.scales is not None
        rows = rows.float() * info.scales.unsqueeze(1)
    assert torch.equal(decoded, rows)
    assert payload["items"][0]["layout"]["fine"]["columns"] == 3
