"""Pictures of feature maps: what is chosen to be drawn, against plain linear algebra, and what the pixels show."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from edge_backbones.errors import InputError, MissingDependencyError
from edge_backbones.pictures import as_map, choose_view, draw_feature_maps, draw_frame, draw_layers, palette

WIDTH, TILE, PITCH, LEFT = 1100, 168, 178, 21
GREY = (150, 150, 150)


def smooth_map(channels: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Mixtures of a few waves and a little noise, float32 (channels, rows, columns)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    waves = np.stack([np.sin(x / 2), np.cos(y / 3), np.sin((x + y) / 4), np.cos(x * y / 40)])
    mixed = np.einsum("cw,whx->chx", random.normal(size=(channels, 4)) * [4, 2, 1, 0.5], waves)
    return (mixed + 0.05 * random.normal(size=mixed.shape) + random.normal(size=(channels, 1, 1))).astype(np.float32)


def photograph(rows: int, columns: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, columns, channels), np.uint8)


def tile(frame: np.ndarray, row: int, column: int, rows: int = TILE, columns: int = TILE) -> np.ndarray:
    """Return a tile of a frame whose photograph is square, or wider than high with tiles of ``rows``."""
    top = LEFT + max(rows, 168) + row * (40 + rows + 28) + 40
    left = LEFT + column * PITCH
    return frame[top : top + rows, left : left + columns]


# ---- what is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 9, 11), (40, 4, 6), (24, 24, 24)], ids=str)
def test_components_are_those_of_the_singular_value_decomposition(shape):
    values = smooth_map(*shape)
    view = choose_view(values)
    cells = values.reshape(len(values), -1).astype(np.float64)
    centred = cells - cells.mean(axis=1, keepdims=True)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(view.components @ left[:, :3]), np.eye(3), atol=1e-6)
    assert view.explained == pytest.approx((sizes[:3] ** 2).sum() / (sizes**2).sum())
    for component, span in zip(view.components, view.spans, strict=True):
        assert component[np.argmax(np.abs(component))] > 0
        np.testing.assert_allclose(span, np.percentile(component @ centred, [1, 99]), rtol=1e-9, atol=1e-9)


def test_the_same_maps_give_the_same_picture_whatever_their_memory_is_like():
    values = smooth_map(16, 14, 14)
    other = np.asfortranarray(values.astype(np.float64))
    first, second = (draw_frame(photograph(56, 56), {"s": one}, title="t") for one in (values, other))
    np.testing.assert_array_equal(first, second)


def test_channels_that_repeat_others_are_not_chosen():
    random = np.random.default_rng(0)
    four = random.normal(size=(4, 20, 20)) * np.array([10, 8, 6, 4])[:, None, None]
    twins = np.concatenate(
        [four[:1] * f + 0.3 * random.normal(size=(1, 20, 20)) for f in (0.99, -0.98, 0.97, 0.96, 0.95)]
    )
    values = np.concatenate([twins, four])
    assert list(choose_view(values).channels) == [5, 6, 7, 8]
    correlated = np.abs(np.corrcoef(values.reshape(9, -1)))[np.ix_([5, 0, 1], [5, 0, 1])]
    assert correlated.min() > 0.98  # what the largest variances alone would have taken


def test_a_strong_near_twin_gives_way_to_a_weaker_channel_that_is_new():
    random = np.random.default_rng(3)
    first, other, new = random.normal(size=(3, 30, 30))
    twin = 9 * (0.9 * first + 0.43 * other)
    values = np.stack([10 * first, twin, 3.5 * new])
    unexplained = (1 - 0.9**2) * 81
    assert unexplained > 3.5**2  # plain pivoting would take the twin second
    assert list(choose_view(values).channels) == [0, 2, 1]


@pytest.mark.parametrize(
    ("values", "channels"),
    [
        (np.full((6, 3, 4), 1 / 3, np.float32), 0),
        (np.ones((6, 1, 1), np.float32), 0),
        (smooth_map(1, 6, 6), 1),
        (smooth_map(2, 6, 6), 2),
        (np.concatenate([smooth_map(2, 6, 6), np.zeros((5, 6, 6), np.float32)]), 2),
        (np.full((3, 4, 4), np.nan, np.float32), 0),
        (np.full((3, 1, 1), np.inf, np.float32), 0),
        (np.full((3, 4, 4), 65504, np.float16), 0),
        ((smooth_map(8, 4, 4) * 1e30).astype(np.float32), 4),
    ],
    ids=["constant", "one cell", "one channel", "two channels", "dead channels", "nan", "inf", "float16", "huge"],
)
def test_maps_with_little_in_them_are_drawn(values, channels):
    view = choose_view(values)
    assert len(view.channels) == channels
    assert np.isfinite(view.components).all()
    assert (view.explained > 0) == (channels > 0)
    frame = draw_frame(photograph(64, 64), {"s": values}, title="t")
    colours = set(map(tuple, tile(frame, 0, 0).reshape(-1, 3)))
    assert colours == {GREY} if not np.isfinite(values).any() else colours == {(128,) * 3} if not channels else colours
    assert bool((tile(frame, 0, 2) != 255).any()) == (channels > 0)


def test_cells_that_are_not_finite_are_grey_and_change_nothing_else():
    values = smooth_map(12, 7, 7)
    damaged = values.copy()
    damaged[3, 2, 4] = np.nan
    clean = values.copy()
    clean[:, 2, 4] = values[:, 2, 3]
    view = choose_view(damaged)
    assert view.explained == pytest.approx(choose_view(clean).explained, abs=0.05)
    frame = draw_frame(photograph(64, 64), {"s": damaged}, title="t")
    for column in range(6):
        cells = tile(frame, 0, column)[12::24, 12::24]  # the middle of each of 7 x 7 cells
        grey = (cells == GREY).all(axis=2)
        assert np.argwhere(grey).tolist() == [[2, 4]]


def test_large_maps_are_sampled_and_wholly_drawn():
    values = np.zeros((4, 300, 500), np.float32)
    values += np.arange(500, dtype=np.float32)
    values[1] *= np.sin(np.arange(300) / 30)[:, None]
    view = choose_view(values)
    np.testing.assert_allclose(view.channels[0], np.percentile(np.arange(500), [1, 99]), atol=5)
    frame = draw_frame(photograph(60, 100), {"s": values}, title="t")
    energy = tile(frame, 0, 1, rows=101)
    assert energy[:, 0].mean() < 0.2 * energy[:, -1].mean()


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_tiles_are_the_components_the_energy_and_the_channels():
    values = smooth_map(16, 14, 14).astype(np.float16)
    view = choose_view(values)
    frame = draw_frame(photograph(56, 56), {"other": smooth_map(3, 7, 7), "s": values}, title="t")
    wide = values.astype(np.float64)

    def levels(one: np.ndarray, low: float, high: float) -> np.ndarray:
        return np.floor(np.clip((one - low) / (high - low) * 255, 0, 255) + 0.5).astype(int)

    mixed = np.einsum("kc,chw->khw", view.components, wide - view.mean[:, None, None])
    colours = np.stack([levels(one, *span) for one, span in zip(mixed, view.spans, strict=True)], axis=2)
    energy = np.sqrt((wide**2).mean(axis=0))
    expected = [colours, palette("magma")[levels(energy, *np.percentile(energy, [1, 99]))]]
    expected += [palette("viridis")[levels(wide[c], *np.percentile(wide[c], [1, 99]))] for c in view.channels]
    assert len(expected) == 6
    for column, one in enumerate(expected):
        drawn = tile(frame, 1, column).astype(int)
        assert np.abs(drawn[6::12, 6::12] - one).max() <= 3  # a level apart where rounding goes the other way
        np.testing.assert_array_equal(drawn, drawn[::12, ::12].repeat(12, axis=0).repeat(12, axis=1))  # whole cells


@pytest.mark.parametrize("grid", [(37, 37), (5, 9), (1, 1), (200, 300), (168, 168)], ids=str)
def test_every_grid_fills_its_tile_in_cells_of_one_size(grid):
    values = np.zeros((2, *grid), np.float32)
    values[0, : (grid[0] + 1) // 2] = 1
    values[1] = np.arange(grid[1])
    frame = draw_frame(photograph(70, 70), {"s": values}, title="t")
    assert (tile(frame, 0, 0) != 255).any(axis=2).all()
    assert (frame[:, LEFT + TILE : LEFT + PITCH][-TILE:] == 255).all()


@pytest.mark.parametrize(
    ("rows", "columns", "drawn"),
    [(56, 56, (168, 168)), (48, 96, (84, 168)), (120, 60, (336, 168)), (600, 60, (336, 34)), (10, 400, (4, 168))],
)
def test_tiles_have_the_photographs_proportions(rows, columns, drawn):
    frame = draw_frame(photograph(rows, columns), {"s": smooth_map(4, 2, 2)}, title="t")
    assert frame.shape[1] == WIDTH
    white = (frame == 255).all(axis=2)
    row = white[LEFT + max(drawn[0], 168) + 40 + drawn[0] // 2]  # through the middle of the tiles
    assert (~row[LEFT : LEFT + TILE]).sum() == drawn[1]


def test_the_size_depends_on_the_photograph_and_the_number_of_stages_alone():
    maps = {"a": smooth_map(4, 7, 7), "b": smooth_map(9, 14, 14)}
    first = draw_frame(photograph(61, 83), maps, title="t")
    other = {"x" * 300: np.full((1, 3, 5), np.nan), "y": smooth_map(64, 40, 40)}
    second = draw_frame(photograph(61, 83, 1), other, title="t" * 500)
    assert first.shape == second.shape
    assert first.dtype == np.uint8
    assert all(length % 2 == 0 for length in first.shape[:2])
    assert draw_frame(photograph(61, 83), dict.fromkeys("abc", maps["a"]), title="").shape[0] > first.shape[0]


def test_the_photograph_is_drawn_once_and_a_grey_one_in_grey():
    colour = np.zeros((168, 168, 3), np.uint8)
    colour[:84] = (200, 30, 90)
    flat = np.zeros((2, 3, 3), np.float32)
    frame = draw_frame(colour, {"a": flat, "b": flat}, title="t")
    np.testing.assert_array_equal(frame[LEFT : LEFT + 168, LEFT : LEFT + 168], colour)
    assert (frame == (200, 30, 90)).all(axis=2).sum() == 84 * 168
    grey = draw_frame(colour[..., :1], {"a": flat}, title="t")
    np.testing.assert_array_equal(grey[LEFT : LEFT + 168, LEFT : LEFT + 168], colour[..., :1].repeat(3, axis=2))


def test_frames_that_share_views_have_the_same_colours():
    values = smooth_map(16, 7, 7)
    mean = choose_view(values).mean[:, None, None].astype(np.float32)
    half = values / 2 + mean / 2
    alone, halved = (draw_frame(photograph(64, 64), {"s": one}, title="t") for one in (values, half))
    views = {}
    first, second = (draw_frame(photograph(64, 64), {"s": one}, title="t", views=views) for one in (values, half))
    np.testing.assert_array_equal(first, alone)
    assert list(views) == ["s"]
    # Half the distance from the mean is half the contrast. Alone it is stretched to all colours again.
    assert np.ptp(tile(second, 0, 0).astype(int)) < 0.8 * np.ptp(tile(first, 0, 0).astype(int))
    assert np.abs(tile(halved, 0, 0).astype(int) - tile(first, 0, 0)).max() <= 1


def test_a_frame_in_which_nothing_varies_chooses_no_view():
    values, black, views = smooth_map(16, 7, 7), np.zeros((16, 7, 7), np.float32), {}
    draw_frame(photograph(64, 64), {"s": black}, title="t", views=views)
    second = draw_frame(photograph(64, 64), {"s": values}, title="t", views=views)
    np.testing.assert_array_equal(second, draw_frame(photograph(64, 64), {"s": values}, title="t"))
    kept = views["s"]
    draw_frame(photograph(64, 64), {"s": black}, title="t", views=views)
    assert views["s"] is kept


def test_views_of_other_maps_are_refused():
    views = {"a": choose_view(smooth_map(4, 7, 7))}
    with pytest.raises(InputError, match="a has 5 channels, and its view is one of 4 channels: begin with an empty"):
        draw_frame(photograph(64, 64), {"a": smooth_map(5, 7, 7)}, title="t", views=views)


HOSTILE = "\x1b[2J\n\u202e$\\frac{a}$ Größe 日本 \ud800"


def test_names_are_made_visible_and_stay_on_the_page(tmp_path):
    maps = {"pool4": smooth_map(3, 4, 4)}
    plain = draw_frame(photograph(64, 64), maps, title="")
    for name in (HOSTILE, "n" * 400, HOSTILE * 20):
        frame = draw_frame(photograph(64, 64), {name: maps["pool4"]}, title=name)
        assert frame.shape == plain.shape
        assert (frame[:, -LEFT:] == 255).all()
        np.testing.assert_array_equal(tile(frame, 0, 0), tile(plain, 0, 0))
    escaped = (
        HOSTILE.replace("\x1b", "\\x1b").replace("\n", "\\n").replace("\u202e", "\\u202e").replace("\ud800", "\\ud800")
    )
    np.testing.assert_array_equal(
        draw_frame(photograph(64, 64), maps, title=HOSTILE), draw_frame(photograph(64, 64), maps, title=escaped)
    )


def test_the_file_is_the_frame(tmp_path):
    maps = {"s": smooth_map(8, 7, 7)}
    path = tmp_path / "new" / "folder" / "x.png"
    draw_feature_maps(path, photograph(64, 96), maps, title="t")
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture), draw_frame(photograph(64, 96), maps, title="t"))


@pytest.mark.parametrize("absent", ["matplotlib", "PIL"])
def test_a_missing_library_names_the_extra(monkeypatch, absent):
    from edge_backbones import pictures

    pictures._font.cache_clear()
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingDependencyError, match="drawing pictures needs the 'report' extra"):
        draw_frame(photograph(64, 64), {"s": smooth_map(3, 4, 4)}, title="t")


# ---- layouts and layers ---------------------------------------------------------------------------------------------


def test_every_layout_becomes_the_same_map():
    values = smooth_map(5, 3, 4)
    tokens = values.reshape(5, 12).T
    prefixed = np.concatenate([np.full((2, 5), 9, np.float32), tokens])
    for output, layout in ((values, "NCHW"), (values.transpose(1, 2, 0), "NHWC"), (tokens, "NLC"), (prefixed, "NLC")):
        np.testing.assert_array_equal(as_map(output, layout, (3, 4)), values)
    assert as_map(values.mean(axis=(1, 2)), "NC", (3, 4)) is None
    assert as_map(tokens[:6], "NLC", (3, 4)) is None
    assert as_map(tokens[:1], "NLC", (1, 1)) is None


def test_layers_are_drawn_with_their_origin_in_red(tmp_path):
    path = tmp_path / "layers.png"
    draw_layers(path, [("conv $x$", 40.0), (HOSTILE[:-1], 9.0)], origin=HOSTILE[:-1], limit_db=15, title="t")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels == (0xC0, 0x39, 0x2B)).all(axis=2).sum() > 1000
