"""Masks against closed forms and against a slow, obvious sampler.

Every statistical test has a fixed seed and, over seeds, a false-alarm probability of about ALPHA:
m frequencies are tested exactly, each two-sided at ALPHA / m (Bonferroni), distributions by
chi-square at ALPHA, with at least 10 expected in every cell.
"""

import inspect
import itertools
import math
import random
from collections import Counter
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, chi2_contingency, hypergeom

from speechbrain_jepa.inverse_blocks import InverseBlockMasking
from speechbrain_jepa.masking import (
    MultiBlockMasking,
    PatchMasks,
    TimeMasking,
    UnstructuredMasking,
    for_grid,
)
from speechbrain_jepa.vit import PatchGrid

ALPHA = 1e-6  # false alarms of one test
STRATEGIES = [UnstructuredMasking, MultiBlockMasking, TimeMasking]
BLOCK_STRATEGIES = [MultiBlockMasking, TimeMasking]
GRIDS = {
    "5x13": PatchGrid(frames=208),
    "5x20": PatchGrid(frames=320),
    "5x40": PatchGrid(frames=640),
    "5x52": PatchGrid(frames=208, patch_frequency=16, patch_time=4),
    "1x104": PatchGrid(frames=208, patch_frequency=80, patch_time=2),
}
GRID = GRIDS["5x13"]
ROWS, COLUMNS = 5, 13

all_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
all_strategies = pytest.mark.parametrize("strategy", STRATEGIES)
block_strategies = pytest.mark.parametrize("strategy", BLOCK_STRATEGIES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_maps(masks: PatchMasks, num_patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Boolean maps [B, N] of context and target."""
    maps = []
    for index, valid in (
        (masks.context_index, masks.context_valid),
        (masks.target_index, masks.target_valid),
    ):
        valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        count = torch.zeros(len(masks), num_patches, dtype=torch.int64)
        count.scatter_add_(1, index, valid.long())
        assert count.max() <= 1, "a patch is listed twice"
        maps.append(count.bool().numpy())
    return maps[0], maps[1]


def draw(masking, clips, seed=0, grid=GRID) -> tuple[np.ndarray, np.ndarray]:
    return to_maps(masking(clips, generator=seeded(seed)), grid.num_patches)


# --- what statistics calls unlikely -----------------------------------------------------------


def assert_frequencies(counts, clips, expected):
    """Each of many counts is a binomial draw of its expected probability."""
    counts, expected = np.asarray(counts, dtype=int), np.asarray(expected, dtype=float)
    assert ((expected > 0) & (expected < 1)).all()
    below, above = binom.cdf(counts, clips, expected), binom.sf(counts - 1, clips, expected)
    assert 2 * np.minimum(below, above).min() > ALPHA / counts.size


def assert_same_frequencies(counts, clips, other_counts, other_clips):
    """Two samples of the same Bernoulli variables (Fisher's exact test)."""
    counts, both = np.asarray(counts, dtype=int), np.asarray(counts) + np.asarray(other_counts)
    known = (clips + other_clips, both, clips)
    below, above = hypergeom.cdf(counts, *known), hypergeom.sf(counts - 1, *known)
    assert 2 * np.minimum(below, above).min() > ALPHA / counts.size


def assert_distribution(observed: Counter, expected: dict):
    """Chi-square of counts against probabilities; cells expecting fewer than 10 are pooled."""
    clips = sum(observed.values())
    assert set(observed) <= set(expected), "an outcome that cannot be"
    assert sum(expected.values()) == pytest.approx(1.0)
    cells = [(observed[key], clips * p) for key, p in expected.items() if clips * p >= 10]
    rare = [(observed[key], clips * p) for key, p in expected.items() if 0 < clips * p < 10]
    if sum(e for _, e in rare) >= 10:
        cells.append((sum(o for o, _ in rare), sum(e for _, e in rare)))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    assert statistic < chi2.isf(ALPHA, max(len(cells) - 1, 1))


def assert_independent(first, second):
    """Chi-square of a contingency table of two discrete variables; rare values are dropped."""
    pairs = list(zip(first, second, strict=True))
    common = [
        {value for value, count in Counter(side).items() if count > 0.02 * len(pairs)}
        for side in (first, second)
    ]
    kept = Counter((a, b) for a, b in pairs if a in common[0] and b in common[1])
    table = [[kept[a, b] for b in sorted(common[1])] for a in sorted(common[0])]
    assert len(table) > 1 and len(table[0]) > 1
    assert chi2_contingency(table, correction=False).pvalue > ALPHA


# --- closed forms -----------------------------------------------------------------------------


def sides(area, aspect, rows, columns):
    """Height and width in whole patches: a side beyond the grid is cut, the other keeps the area.

    Of arrays of areas (in patches) and aspect ratios (height / width).
    """
    height, width = np.sqrt(area * aspect), np.sqrt(area / aspect)
    too_high, too_wide = height > rows, width > columns
    height, width = (
        np.where(too_high, rows, np.where(too_wide, np.minimum(area / columns, rows), height)),
        np.where(too_wide, columns, np.where(too_high, np.minimum(area / rows, columns), width)),
    )
    return np.maximum(np.rint(height), 1), np.maximum(np.rint(width), 1)


@cache
def size_probabilities(kind, rows, columns, share, aspect=(1.0, 1.0)) -> dict:
    """P(height, width) of a block, by the midpoint rule over share and aspect."""
    n = 300  # cells a side: an error of about 2e-4, where 16 000 draws deviate by 4e-3

    def midpoints(low, high):
        return low + (high - low) * (np.arange(n) + 0.5) / n

    if kind == "time":
        widths = np.maximum(np.rint(midpoints(*share) * columns), 1).astype(int)
        return {(rows, w): c / n for w, c in Counter(widths.tolist()).items()}
    area, ratio = np.meshgrid(midpoints(*share) * rows * columns, midpoints(*aspect))
    heights, widths = sides(area, ratio, rows, columns)
    codes, counts = np.unique(heights * 1000 + widths, return_counts=True)
    return {
        divmod(int(code), 1000): count / n**2 for code, count in zip(codes, counts, strict=True)
    }


def covered(size, length):
    """Boolean [places, length]: which positions each place of a span covers."""
    return np.array([[s <= x < s + size for x in range(length)] for s in range(length - size + 1)])


def cover_probabilities(sizes: dict, rows, columns) -> tuple[np.ndarray, np.ndarray]:
    """P(patch i is in a block) [N] and P(i and j are in it) [N, N]; every place equally likely."""
    single, double = np.zeros(rows * columns), np.zeros((rows * columns,) * 2)
    for (height, width), p in sizes.items():
        in_rows, in_columns = covered(height, rows), covered(width, columns)
        blocks = (in_rows[:, None, :, None] & in_columns[None, :, None, :]).astype(float)
        blocks = blocks.reshape(-1, rows * columns)
        single += p * blocks.mean(0)
        double += p * blocks.T @ blocks / len(blocks)
    return single, double


def closed_form(strategy, grid, blocks=4, target_share=(0.15, 0.2)):
    """Default strategies without redraws: [N] context, [N] target, [N, N] neither is a target.

    On these grids four target blocks are smaller than the smallest context block (5 x 13: at most
    4 x 13 = 52 of 55 patches), or nearly never cover it: redraws change nothing that can be seen.
    """
    rows, columns = grid.frequency_patches, grid.time_patches
    kind = "time" if strategy is TimeMasking else "block"
    target_sizes = size_probabilities(kind, rows, columns, target_share, (0.75, 1.5))
    context_sizes = size_probabilities(kind, rows, columns, (0.85, 1.0), (1.0, 1.0))
    single, double = cover_probabilities(target_sizes, rows, columns)
    free = (1 - single) ** blocks
    neither = (1 - single[:, None] - single[None, :] + double) ** blocks
    context = cover_probabilities(context_sizes, rows, columns)[0] * free
    return context, 1 - free, neither


# --- the slow, obvious sampler ----------------------------------------------------------------


def slow_sides(area, aspect, rows, columns) -> tuple[int, int]:
    """As `sides`, one block at a time."""
    height, width = math.sqrt(area * aspect), math.sqrt(area / aspect)
    if height > rows:
        height, width = rows, area / rows
    if width > columns:
        height, width = min(area / columns, rows), columns
    return max(round(height), 1), max(round(width), 1)


def slow_block(rng, strategy, grid, share, aspect):
    """One block as a set of patch numbers."""
    rows, columns = grid.frequency_patches, grid.time_patches
    fraction = rng.uniform(*share)
    if strategy is TimeMasking:
        height, width = rows, max(round(fraction * columns), 1)
    else:
        area = fraction * rows * columns
        height, width = slow_sides(area, rng.uniform(*aspect), rows, columns)
    top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)  # both ends count
    return {
        row * columns + column
        for row in range(top, top + height)
        for column in range(left, left + width)
    }


def slow_clip(rng, strategy, grid, num_targets, target_share, context_share, at_least):
    """Context and target of one clip: everything is drawn again until the context is enough."""
    while True:
        target = set()
        for _ in range(num_targets):
            target |= slow_block(rng, strategy, grid, target_share, (0.75, 1.5))
        context = slow_block(rng, strategy, grid, context_share, (1.0, 1.0)) - target
        if len(context) >= at_least:
            return context, target


# --- shape and type ---------------------------------------------------------------------------


@all_strategies
@all_grids
@pytest.mark.parametrize("clips", [1, 2, 64])
def test_masks_are_ascending_disjoint_and_never_empty(strategy, grid, clips):
    masks = strategy(grid)(clips, generator=seeded(0))
    assert len(masks) == clips
    for index, valid in (
        (masks.context_index, masks.context_valid),
        (masks.target_index, masks.target_valid),
    ):
        assert index.dtype == torch.int64 and index.shape[0] == clips
        assert index.min() >= 0 and index.max() < grid.num_patches
        if valid is None:
            valid = torch.ones_like(index, dtype=torch.bool)
        assert valid.dtype == torch.bool and valid.shape == index.shape
        assert valid[:, 0].all(), "a clip without a patch"
        assert valid.any(0).all(), "wider than the longest row"
        assert (valid[:, :-1] >= valid[:, 1:]).all(), "padding before a valid entry"
        ascending = index[:, 1:] > index[:, :-1]
        assert ascending[valid[:, 1:]].all()
    context, target = to_maps(masks, grid.num_patches)
    assert not (context & target).any()
    for row in range(clips):
        alone = masks.clip(row)
        assert alone.context_valid is None and alone.target_valid is None
        assert alone.context_index.tolist() == [np.flatnonzero(context[row]).tolist()]
        assert alone.target_index.tolist() == [np.flatnonzero(target[row]).tolist()]


def test_validity_is_absent_exactly_where_all_rows_are_as_long():
    same = torch.tensor([[True, False, True], [False, True, True]])
    masks = PatchMasks.from_maps(context=~same, target=same)
    assert masks.context_valid is None and masks.target_valid is None
    assert masks.target_index.tolist() == [[0, 2], [1, 2]]


@all_strategies
def test_masks_are_frozen(strategy):
    masks = strategy(GRID)(2)
    with pytest.raises(AttributeError):
        masks.context_index = masks.target_index


@all_grids
def test_unstructured_context_and_target_are_all_patches(grid):
    masks = UnstructuredMasking(grid)(8, generator=seeded(0))
    both = torch.cat([masks.context_index, masks.target_index], 1).sort(1).values
    assert torch.equal(both, torch.arange(grid.num_patches).expand(8, -1))
    assert masks.context_valid is None and masks.target_valid is None


@pytest.mark.parametrize(
    ("share", "context"),
    [(0.6, 26), (0.7, 20), (0.5, 32), (0.01, 64), (0.99, 1)],  # 26 of 65: released code
)
def test_unstructured_context_is_the_rounded_rest(share, context):
    assert UnstructuredMasking(GRID, share)(1).context_index.shape == (1, context)


@all_grids
def test_time_masks_take_all_frequency_patches_of_a_time(grid):
    context, target = draw(TimeMasking(grid), 256, grid=grid)
    for maps in (context, target):
        maps = maps.reshape(-1, grid.frequency_patches, grid.time_patches)
        assert (maps.all(1) == maps.any(1)).all()


# --- frequency of every patch -----------------------------------------------------------------


def test_unstructured_target_frequencies_and_pairs_match_the_closed_form():
    clips = 16_000
    _, target = draw(UnstructuredMasking(GRID), clips)
    assert_frequencies(target.sum(0), clips, np.full(65, 39 / 65))
    pairs = target.T.astype(float) @ target.astype(float)
    upper = np.triu_indices(65, 1)
    # any 2 of 65 patches are both among the 39 targets
    assert_frequencies(pairs[upper], clips, np.full(len(upper[0]), 39 * 38 / (65 * 64)))


@block_strategies
@all_grids
def test_block_frequencies_match_the_closed_form(strategy, grid):
    clips = 8_000
    context, target = draw(strategy(grid), clips, grid=grid)
    expected_context, expected_target, _ = closed_form(strategy, grid)
    assert_frequencies(context.sum(0), clips, expected_context)
    assert_frequencies(target.sum(0), clips, expected_target)


@block_strategies
def test_pairs_of_patches_match_the_closed_form_of_independent_blocks(strategy):
    """Sizes or places shared by the blocks of a clip would leave single patches as they are.

    Sizes from 5 to 40 % make blocks that share one stand out.
    """
    clips, share = 16_000, (0.05, 0.4)
    masking = strategy(GRID, num_targets=2, target_share=share, context_share=(1.0, 1.0))
    free = ~draw(masking, clips)[1]
    pairs = free.T.astype(float) @ free.astype(float)
    upper = np.triu_indices(65, 1)
    expected = closed_form(strategy, GRID, blocks=2, target_share=share)[2]
    assert_frequencies(pairs[upper], clips, expected[upper])


SLOW_CASES = {  # strategy, grid, target_share, context_share, min_context_patches
    "multi-block": (MultiBlockMasking, "5x13", (0.15, 0.2), (0.85, 1.0), 1),
    "multi-block, redraws": (MultiBlockMasking, "5x13", (0.2, 0.25), (0.85, 1.0), 20),
    "multi-block, small context": (MultiBlockMasking, "5x20", (0.15, 0.2), (0.2, 0.4), 10),
    "time": (TimeMasking, "5x13", (0.15, 0.2), (0.85, 1.0), 1),
    "time, redraws": (TimeMasking, "5x13", (0.2, 0.25), (0.5, 1.0), 15),
    "time, 80 x 2 patches": (TimeMasking, "1x104", (0.15, 0.2), (0.85, 1.0), 40),
}


@pytest.mark.parametrize("case", SLOW_CASES.values(), ids=SLOW_CASES.keys())
def test_masks_match_a_slow_sampler_that_redraws_clips_with_too_little_context(case):
    strategy, grid, target_share, context_share, at_least = case
    grid, rng, slow_clips, clips = GRIDS[grid], random.Random(0), 2_000, 8_000
    slow = np.zeros((2, slow_clips, grid.num_patches), dtype=bool)
    for clip in range(slow_clips):
        drawn = slow_clip(rng, strategy, grid, 4, target_share, context_share, at_least)
        for side, patches in zip(slow, drawn, strict=True):
            side[clip, list(patches)] = True
    masking = strategy(
        grid,
        target_share=target_share,
        context_share=context_share,
        min_context_patches=at_least,
    )
    for ours, theirs in zip(draw(masking, clips, grid=grid), slow, strict=True):
        assert_same_frequencies(ours.sum(0), clips, theirs.sum(0), slow_clips)
        # and the number of patches of a clip: sizes, overlaps and redraws together
        assert_same_counts(ours.sum(1), theirs.sum(1))
        assert ours.sum(1).min() >= (at_least if theirs is slow[0] else 1)


def assert_same_counts(ours, theirs):
    """Chi-square of two samples of a count, rare values pooled with their neighbours."""
    edges = np.unique(np.quantile(np.concatenate([ours, theirs]), np.linspace(0, 1, 11)[1:-1]))
    bins = [np.searchsorted(edges, side) for side in (ours, theirs)]
    table = np.array([np.bincount(side, minlength=len(edges) + 1) for side in bins])
    table = table[:, table.sum(0) > 0]
    assert chi2_contingency(table, correction=False).pvalue > ALPHA


@block_strategies
def test_the_cases_with_redraws_do_redraw(strategy):
    """Without the redraws these frequencies differ by many deviations: the test above can fail."""
    name = "time, redraws" if strategy is TimeMasking else "multi-block, redraws"
    _, _, target_share, context_share, at_least = SLOW_CASES[name]
    shares = {"target_share": target_share, "context_share": context_share}
    with_redraws = draw(strategy(GRID, min_context_patches=at_least, **shares), 8_000)
    without = draw(strategy(GRID, min_context_patches=1, **shares), 8_000)
    poor = (without[0].sum(1) < at_least).mean()
    assert 0.05 < poor < 0.5
    with pytest.raises(AssertionError):
        assert_same_frequencies(with_redraws[0].sum(0), 8_000, without[0].sum(0), 8_000)


# --- sizes and places -------------------------------------------------------------------------


def rectangles(target: np.ndarray, rows, columns) -> list[tuple[int, int, int, int]]:
    """(height, width, top, left) of maps that hold one full rectangle each."""
    found = []
    for clip in target.reshape(-1, rows, columns):
        in_rows, in_columns = np.flatnonzero(clip.any(1)), np.flatnonzero(clip.any(0))
        height, width = len(in_rows), len(in_columns)
        assert (
            in_rows[-1] - in_rows[0] == height - 1 and in_columns[-1] - in_columns[0] == width - 1
        )
        assert clip.sum() == height * width, "a block with patches missing"
        found.append((height, width, int(in_rows[0]), int(in_columns[0])))
    return found


def place_probabilities(sizes: dict, rows, columns) -> dict:
    return {
        (h, w, top, left): p / ((rows - h + 1) * (columns - w + 1))
        for (h, w), p in sizes.items()
        for top in range(rows - h + 1)
        for left in range(columns - w + 1)
    }


@block_strategies
@all_grids
def test_a_target_block_has_the_closed_form_of_sizes_and_every_place_equally(strategy, grid):
    rows, columns = grid.frequency_patches, grid.time_patches
    kind = "time" if strategy is TimeMasking else "block"
    sizes = size_probabilities(kind, rows, columns, (0.15, 0.2), (0.75, 1.5))
    target = draw(strategy(grid, num_targets=1), 8_000, grid=grid)[1]
    blocks = rectangles(target, rows, columns)
    assert_distribution(Counter(block[:2] for block in blocks), sizes)
    assert_distribution(Counter(blocks), place_probabilities(sizes, rows, columns))


def context_columns(context: np.ndarray) -> list[tuple[int, int]]:
    """(width, left) of full-height context blocks from which one target block was removed.

    A multi-block target has at most 4 of 5 rows, so every context column keeps a patch.
    """
    found = []
    for clip in context.reshape(-1, ROWS, COLUMNS):
        columns = np.flatnonzero(clip.any(0))
        assert columns[-1] - columns[0] == len(columns) - 1
        found.append((len(columns), int(columns[0])))
    return found


def test_context_of_5_x_13_covers_85_to_100_percent_before_the_targets_are_removed():
    """11.05 to 13 full columns, rounded: 11 in 0.45 of 1.95 draws, 12 in 1, 13 in 0.5."""
    context, target = draw(MultiBlockMasking(GRID, num_targets=1), 8_000)
    columns = context_columns(context)
    expected = {11: 0.45 / 1.95, 12: 1 / 1.95, 13: 0.5 / 1.95}
    assert_distribution(Counter(width for width, _ in columns), expected)
    assert_distribution(
        Counter(columns),
        {(w, left): p / (14 - w) for w, p in expected.items() for left in range(14 - w)},
    )
    for (width, left), clip, block in zip(columns, context, target, strict=True):
        whole = np.zeros((ROWS, COLUMNS), dtype=bool)
        whole[:, left : left + width] = True
        assert np.array_equal(clip, whole.ravel() & ~block)  # nothing else is missing
        # whole columns: at most half a column, 2.5 patches, from 85-100 % of 65
        assert 0.85 * 65 - 2.5 <= whole.sum() <= 65


def test_context_and_target_blocks_are_drawn_independently():
    context, target = draw(MultiBlockMasking(GRID, num_targets=1), 8_000)
    columns, blocks = context_columns(context), rectangles(target, ROWS, COLUMNS)
    for of_context, of_target in itertools.product(range(2), range(4)):
        assert_independent(
            [column[of_context] for column in columns], [block[of_target] for block in blocks]
        )


def test_sizes_of_a_block_do_not_depend_on_its_neighbours_in_the_batch():
    blocks = rectangles(draw(MultiBlockMasking(GRID, num_targets=1), 8_000)[1], ROWS, COLUMNS)
    for part in range(4):
        values = [block[part] for block in blocks]
        assert_independent(values[:-1], values[1:])


@pytest.fixture(scope="module", params=BLOCK_STRATEGIES, ids=lambda strategy: strategy.__name__)
def pairs_of_clips(request):
    """Target maps [batches, 2, N] of many batches of two clips, one target block each."""
    masking, generator = request.param(GRID, num_targets=1), seeded(0)
    drawn = [to_maps(masking(2, generator=generator), 65)[1] for _ in range(1_500)]
    return request.param, np.stack(drawn)


def test_two_clips_of_a_batch_are_independent(pairs_of_clips):
    strategy, target = pairs_of_clips
    first, second = (rectangles(target[:, clip], ROWS, COLUMNS) for clip in range(2))
    varying = (1, 3) if strategy is TimeMasking else range(4)  # times have full height
    for part in varying:
        assert_independent([block[part] for block in first], [block[part] for block in second])
    together = target[:, 0].T.astype(float) @ target[:, 1].astype(float)
    share = 1 - closed_form(strategy, GRID, blocks=1)[1]
    expected = np.outer(1 - share, 1 - share)
    assert_frequencies(together.ravel(), len(target), expected.ravel())


def test_a_clip_is_distributed_alike_in_small_and_large_batches(pairs_of_clips):
    strategy, target = pairs_of_clips
    kind = "time" if strategy is TimeMasking else "block"
    sizes = size_probabilities(kind, ROWS, COLUMNS, (0.15, 0.2), (0.75, 1.5))
    expected = place_probabilities(sizes, ROWS, COLUMNS)
    for clip in range(2):
        assert_distribution(Counter(rectangles(target[:, clip], ROWS, COLUMNS)), expected)
    masking, generator = strategy(GRID, num_targets=1), seeded(1)
    alone = [to_maps(masking(1, generator=generator), 65)[1] for _ in range(1_000)]
    assert_distribution(Counter(rectangles(np.concatenate(alone), ROWS, COLUMNS)), expected)


@block_strategies
def test_nothing_is_cut_to_the_smallest_clip_of_a_batch(strategy):
    """The share of clips of each size is the same alone as among 511 others."""
    masking, generator = strategy(GRID), seeded(0)
    alone = [to_maps(masking(1, generator=generator), 65) for _ in range(1_000)]
    for side, together in enumerate(draw(masking, 512, seed=1)):
        counts = np.array([maps[side].sum() for maps in alone])
        assert_same_counts(together.sum(1), counts)
        assert len(set(together.sum(1).tolist())) > 3


# --- reach ------------------------------------------------------------------------------------


@all_strategies
@all_grids
def test_every_patch_is_reached_as_context_and_as_target(strategy, grid):
    """The last row and column included: the rarest, a corner, is a target in 1 clip of 50."""
    context, target = draw(strategy(grid), 2_000, grid=grid)
    assert context.any(0).all()
    assert target.any(0).all()


@all_grids
def test_context_blocks_of_full_size_are_reached(grid):
    for strategy in BLOCK_STRATEGIES:
        context, target = draw(strategy(grid), 2_000, grid=grid)
        assert (context | target).all(1).any()


@block_strategies
def test_a_context_share_of_one_is_everything_but_the_targets(strategy):
    context, target = draw(strategy(GRID, context_share=(1.0, 1.0)), 500)
    assert (context == ~target).all()


def test_multi_block_sides_are_cut_to_the_grid_and_the_other_side_keeps_the_area():
    """Half of 5 x 13 is 32.5 patches: a square of 5.7 becomes 5 x 6.5, that is 5 x 6 or 5 x 7."""
    shares = {"target_share": (0.47, 0.53), "target_aspect": (1.0, 1.0), "num_targets": 1}
    blocks = rectangles(draw(MultiBlockMasking(GRID, **shares), 1_000)[1], ROWS, COLUMNS)
    assert {block[:2] for block in blocks} == {(5, 6), (5, 7)}
    # one row of patches, 80 x 2: only the width is free
    grid = GRIDS["1x104"]
    target = draw(MultiBlockMasking(grid, **shares), 1_000, grid=grid)[1]
    blocks = rectangles(target, 1, 104)
    assert {block[1] for block in blocks} == set(range(49, 56))  # 48.9 to 55.1


def test_multi_block_aspect_is_height_over_width():
    tall = MultiBlockMasking(GRID, num_targets=1, target_aspect=(4.0, 4.0))
    wide = MultiBlockMasking(GRID, num_targets=1, target_aspect=(0.25, 0.25))
    # 9.75 to 13 patches: 6.2-7.2 x 1.6-1.8, cut to 5 rows; 1.6-1.8 x 6.2-7.2
    for masking, sizes in ((tall, {(5, 2), (5, 3)}), (wide, {(2, 6), (2, 7)})):
        assert {block[:2] for block in rectangles(draw(masking, 500)[1], ROWS, COLUMNS)} == sizes


# --- randomness -------------------------------------------------------------------------------


@all_strategies
def test_the_generator_alone_decides(strategy):
    masking = strategy(GRID)
    torch.manual_seed(1)
    first = draw(masking, 32, seed=5)
    torch.manual_seed(2)
    assert all(map(np.array_equal, first, draw(masking, 32, seed=5)))
    assert all(map(np.array_equal, first, draw(strategy(GRID), 32, seed=5)))
    assert not all(map(np.array_equal, first, draw(masking, 32, seed=6)))


@all_strategies
def test_without_a_generator_the_global_seed_decides(strategy):
    masking, drawn = strategy(GRID), []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(to_maps(masking(16), 65))
    assert all(map(np.array_equal, *drawn))


@all_strategies
def test_construction_and_a_generator_leave_the_global_state_alone(strategy):
    before = torch.get_rng_state()
    strategy(GRID)(8, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


@all_strategies
def test_successive_draws_of_a_generator_differ(strategy):
    masking, generator = strategy(GRID), seeded(0)
    first, second = (to_maps(masking(16, generator=generator), 65) for _ in range(2))
    assert not np.array_equal(first[1], second[1])


# --- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001, 0.999, -0.5, 1.5])
def test_unstructured_refuses_shares_that_leave_one_side_empty(share):
    with pytest.raises(ValueError, match=f"target_share={share} of 65 patches"):
        UnstructuredMasking(GRID, share)


@all_strategies
def test_a_single_patch_cannot_be_both(strategy):
    with pytest.raises(ValueError):
        strategy(PatchGrid(frames=16, patch_frequency=80, patch_time=16))


@block_strategies
@pytest.mark.parametrize("name", ["target_share", "context_share"])
@pytest.mark.parametrize("range_", [(0.0, 0.2), (0.3, 0.2), (0.5, 1.1), (-0.1, 0.2)])
def test_shares_outside_0_to_1_or_upside_down_are_refused_by_name(strategy, name, range_):
    with pytest.raises(ValueError, match=name):
        strategy(GRID, **{name: range_})


@pytest.mark.parametrize("name", ["target_aspect", "context_aspect"])
@pytest.mark.parametrize("range_", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_aspects_that_are_not_positive_or_upside_down_are_refused_by_name(name, range_):
    with pytest.raises(ValueError, match=name):
        MultiBlockMasking(GRID, **{name: range_})


@block_strategies
@pytest.mark.parametrize("wrong", [{"num_targets": 0}, {"min_context_patches": 0}])
def test_counts_below_one_are_refused_by_name(strategy, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        strategy(GRID, **wrong)


@block_strategies
@pytest.mark.parametrize(
    "wrong",
    [
        {"target_share": (1.0, 1.0)},
        {"num_targets": 100},
        {"min_context_patches": 60},
        {"min_context_patches": 66},
    ],
)
def test_targets_that_leave_too_little_context_are_refused_at_construction(strategy, wrong):
    with pytest.raises(ValueError, match="fewer or smaller target blocks"):
        strategy(GRID, **wrong)


def test_time_masking_refuses_a_crop_of_one_time_patch():
    with pytest.raises(ValueError, match="context patches in only 0%"):
        TimeMasking(PatchGrid(frames=16))


@block_strategies
def test_ranges_may_be_lists_as_yaml_gives_them(strategy):
    ours = draw(strategy(GRID, target_share=[0.15, 0.2], context_share=[0.85, 1.0]), 16)
    assert all(map(np.array_equal, ours, draw(strategy(GRID), 16)))


def test_the_mean_context_of_the_defaults_is_the_sum_of_its_closed_form():
    """Multi-block at 5 x 13 keeps 26 to 27 context patches, as unstructured masking keeps 26."""
    context, _ = draw(MultiBlockMasking(GRID), 8_000)
    expected = closed_form(MultiBlockMasking, GRID)[0].sum()
    deviation = context.sum(1).std() / math.sqrt(8_000)
    limit = NormalDist().inv_cdf(1 - ALPHA / 2)
    assert abs(context.sum(1).mean() - expected) < limit * deviation


# --- inverse blocks -----------------------------------------------------------------------------


def inverse_maps(clips=4000, block=(3, 3), share=0.8, grid=None):
    grid = grid or PatchGrid(frames=208)
    masks = InverseBlockMasking(grid, share, block)(clips, generator=seeded(0))
    context = torch.zeros(clips, grid.num_patches).scatter_(1, masks.context_index, 1.0)
    target = torch.zeros(clips, grid.num_patches).scatter_(1, masks.target_index, 1.0)
    assert torch.equal(context + target, torch.ones_like(context))
    assert (masks.context_index.diff() > 0).all() and (masks.target_index.diff() > 0).all()
    return context.view(clips, grid.frequency_patches, grid.time_patches)


def test_inverse_blocks_have_the_share_and_reach_every_patch_alike():
    context = inverse_maps()
    assert (context.sum((1, 2)) == 13).all()
    # 4000 draws at 0.2: a deviation of 0.006; the last block's cut is not quite even
    assert (context.mean(0) - 0.2).abs().max() < 0.04


def test_inverse_blocks_are_blocks():
    """Of 13 patches, two neighbours go together far oftener than 13 of 65 at random do."""
    context = inverse_maps()
    both = (context[:, :, 1:] * context[:, :, :-1]).mean() / 0.2
    assert both > 0.6  # at random 12 / 64
    whole = context.unfold(1, 3, 1).unfold(2, 3, 1).amin((-2, -1)).flatten(1).any(1)
    assert whole.float().mean() > 0.3  # at random 33 places x (1e-5 to hold nine of 13): none


def test_inverse_blocks_of_one_patch_are_unstructured():
    context = inverse_maps(block=(1, 1))
    both = (context[:, :, 1:] * context[:, :, :-1]).mean() / 0.2
    assert abs(both - 12 / 64) < 0.02


@pytest.mark.parametrize("block", [(6, 3), (3, 14), (0, 3), (3,)])
def test_inverse_blocks_that_do_not_fit_are_an_error(block):
    with pytest.raises(ValueError, match=r"needs 1 to 5 frequency and 1 to 13 time"):
        InverseBlockMasking(PatchGrid(frames=208), block=block)


@pytest.mark.parametrize(
    "strategy",
    [
        UnstructuredMasking(GRID, target_share=0.7),
        MultiBlockMasking(GRID, num_targets=2, target_aspect=(1.0, 1.0), min_context_patches=2),
        TimeMasking(GRID, num_targets=1, context_share=(0.9, 1.0)),
        InverseBlockMasking(GRID, 0.7, block=(2, 4)),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_strategy_for_another_grid_is_one_built_for_it(strategy):
    other = PatchGrid(frames=320)
    settings = {name: value for name, value in vars(strategy).items() if name != "grid"}
    ours = for_grid(strategy, other)
    names = set(inspect.signature(type(strategy)).parameters) - {"grid"}
    assert {name: settings[name] for name in names} == {name: getattr(ours, name) for name in names}
    masks = ours(64, generator=seeded(0))
    assert masks.target_index.max() == other.num_patches - 1


def test_a_strategy_that_forgets_its_arguments_cannot_be_built_again():
    class Forgetful(UnstructuredMasking):
        def __init__(self, grid, odd_share):
            super().__init__(grid, odd_share)

    with pytest.raises(TypeError, match="Forgetful does not keep its odd_share"):
        for_grid(Forgetful(GRID, 0.6), PatchGrid(frames=320))
