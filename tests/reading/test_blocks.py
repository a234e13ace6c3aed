"""Laws of tiles and spans: every row once, few spans, edges where chunks end, and all of it fast."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlr.dataset.blocks import (
    MAX_SPAN_BYTES,
    MAX_SPANS,
    MIN_SPAN_BYTES,
    TILE_BYTES,
    WAITING_SPAN_BYTES,
    Block,
    Span,
    ended_by_tiles,
    format_bytes,
    spans,
    tile_edges,
    tile_rows,
)
from streamlr.dataset.subset import Subset
from streamlr.dataset.tally import Tally


def cut(n_rows, row_bytes, **options):
    given = {"tile": 1024, "chunks": [1000], "workers": 2, "whole_tiles": False}
    return spans(n_rows, row_bytes, **(given | options))


def assert_covers(found: list[Span], start: int, stop: int) -> None:
    assert found[0].start == start
    assert found[-1].stop == stop
    assert all(a.stop == b.start for a, b in itertools.pairwise(found))
    assert all(span.start < span.stop for span in found)


@given(st.integers(1, 20_000))
def test_a_tile_is_a_power_of_two_with_four_rows_a_column_and_eight_where_rows_are_few(n_columns):
    rows = tile_rows(n_columns)
    assert rows & (rows - 1) == 0
    assert rows >= min(8 * n_columns, 8_192)
    assert rows >= 4 * n_columns
    assert rows * n_columns * 8 <= max(TILE_BYTES, 8 * n_columns * 16 * n_columns)
    assert rows <= 8_192 or rows * n_columns * 8 <= max(TILE_BYTES, 8 * n_columns * 8 * n_columns)


@given(st.integers(1, 20_000), st.integers(0, 10**10))
def test_a_tile_that_leaves_little_is_no_larger_than_a_cache(n_columns, left_bytes):
    rows = tile_rows(n_columns, left_bytes)
    assert rows & (rows - 1) == 0
    assert rows <= tile_rows(n_columns)
    assert rows == tile_rows(n_columns) or 8 * n_columns * rows >= 4 * left_bytes
    assert rows * n_columns * 8 <= max(TILE_BYTES, 16 * left_bytes + 128 * n_columns)
    assert rows <= 8_192 or rows * n_columns * 8 <= max(TILE_BYTES, 8 * left_bytes + 64 * n_columns)


@given(st.integers(0, 10_000), st.integers(1, 10_000), st.integers(0, 12))
def test_tile_edges_cover_the_rows_once_and_cut_where_tiles_end(start, length, power):
    rows = 2**power
    found = tile_edges(start, start + length, rows)
    assert_covers(found, start, start + length)
    assert all(span.stop % rows == 0 for span in found[:-1])
    assert all(span.start // rows == (span.stop - 1) // rows for span in found)


def test_no_rows_have_no_edges():
    assert tile_edges(7, 7, 4) == []


@given(st.integers(0, 50), st.lists(st.integers(1, 40), max_size=12), st.integers(1, 16))
def test_spans_that_follow_on_each_other_end_where_tiles_do(start, lengths, rows):
    edges = list(itertools.accumulate(lengths, initial=start))
    given = [Span(*pair) for pair in itertools.pairwise(edges)]
    drawn, found, at_once = 0, [], []

    def following():
        nonlocal drawn
        for span in given:
            drawn += 1
            yield span

    for span in ended_by_tiles(following(), rows):
        found.append(span)
        at_once.append(given[drawn - 1].stop)
    if given:
        assert_covers(found, edges[0], edges[-1])
    assert all(span.stop % rows == 0 for span in found[:-1])
    assert all(stop - span.stop < rows for span, stop in zip(found, at_once, strict=True)), "nothing is drawn before it is wanted"


@given(
    st.integers(1, 10**13),
    st.integers(1, 10**5),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=3),
    st.integers(1, 256),
    st.booleans(),
    st.integers(5, 14),
)
def test_spans_cover_all_rows_once_and_are_few(n_rows, row_bytes, chunks, workers, whole_tiles, power):
    found = cut(n_rows, row_bytes, chunks=chunks, workers=workers, whole_tiles=whole_tiles, tile=2**power)
    assert_covers(found, 0, n_rows)
    assert len(found) <= MAX_SPANS
    inner = [span.stop for span in found[:-1]]
    if whole_tiles:
        tiles = (found[0].stop - found[0].start) // 2**power if inner else 1
        assert tiles & (tiles - 1) == 0
        assert all(edge % (tiles * 2**power) == 0 for edge in inner)
    else:
        assert all(edge % chunks[0] == 0 for edge in inner), "the heaviest array is decoded once"


@given(st.integers(10**5, 10**9), st.lists(st.integers(1, 50), min_size=2, max_size=3))
def test_spans_follow_the_edges_that_all_chunks_share_when_they_are_near(n_rows, chunks):
    found = cut(n_rows, 100, chunks=chunks, tile=64)
    assert all(span.stop % math.lcm(*chunks) == 0 for span in found[:-1])


def test_spans_follow_the_heaviest_array_when_shared_edges_are_far():
    found = cut(10**7, 10_000, chunks=[9_973, 10_007])  # two primes: nothing is shared for a hundred million rows
    assert len(found) > 100
    assert all(span.stop % 9_973 == 0 for span in found[:-1])


def test_spans_end_where_both_chunks_and_tiles_end_when_that_is_near():
    found = cut(10**7, 100, chunks=[128], tile=1024)
    assert len(found) > 1
    assert all(span.stop % 1024 == 0 for span in found[:-1])


@pytest.mark.parametrize(("n_chunks", "whole_tiles"), [(10**6, False), (10**6, True), (10**9, False), (10**9, True)])
def test_a_million_and_a_billion_chunks_are_planned_at_once(n_chunks, whole_tiles):
    began = time.perf_counter()
    found = cut(100 * n_chunks, 800, chunks=[100, 70], workers=64, whole_tiles=whole_tiles)
    assert time.perf_counter() - began < 0.5
    assert len(found) <= MAX_SPANS
    assert_covers(found, 0, 100 * n_chunks)


def test_spans_balance_the_workers_within_their_bounds():
    row_bytes = 1000
    for total in (2**25, 2**31, 2**36, 2**40):
        n_rows = total // row_bytes
        size = max(span.stop - span.start for span in cut(n_rows, row_bytes)) * row_bytes
        assert size >= min(MIN_SPAN_BYTES, total)
        assert size <= MAX_SPAN_BYTES + 1024 * 1000 * row_bytes or len(cut(n_rows, row_bytes)) > MAX_SPANS // 2


@given(st.integers(1, 10**10), st.integers(1, 10**4), st.integers(1, 10**5), st.integers(1, 64), st.booleans())
def test_spans_differ_by_one_chunk_and_are_as_many_for_every_worker(n_rows, row_bytes, chunk, workers, waiting):
    found = cut(n_rows, row_bytes, chunks=[chunk], tile=chunk, workers=workers, waiting=waiting)
    heights = {-(-(span.stop - span.start) // chunk) for span in found}
    assert max(heights) - min(heights) <= 1
    assert len(found) <= workers or len(found) % workers == 0


@given(st.integers(2**18, 2**34), st.integers(1, 64))
def test_spans_from_a_store_with_latency_are_as_many_for_every_worker(n_rows, workers):
    found = cut(n_rows, 100, chunks=[1, 3], tile=64, workers=workers, waiting=True)
    spans_wanted = workers * -(-100 * n_rows // (workers * WAITING_SPAN_BYTES))
    assert len(found) <= spans_wanted
    longest = max(span.stop - span.start for span in found)
    assert longest <= max(1.2 * n_rows / spans_wanted, MIN_SPAN_BYTES / 100 + 3 * 64)


def test_small_data_are_one_span():
    assert cut(1000, 8, chunks=[1]) == [Span(0, 1000)]


def test_blocks_join_in_order_and_copies_own_their_rows():
    x, y = np.arange(6.0)[:, None], np.arange(6.0)[:, None] + 100
    first, second = Block(0, 4, x[:4], y[:4]), Block(4, 7, x[4:], y[4:])  # one row of the second was left out
    joined = first.followed_by(second)
    assert (joined.start, joined.stop) == (0, 7)
    np.testing.assert_array_equal(np.hstack([joined.x, joined.y]), np.hstack([x, y]))
    weighted = Block(0, 6, x, y, np.arange(6.0)).copy()
    x[:], y[:] = 0, 0
    np.testing.assert_array_equal(weighted.x[:, 0], np.arange(6.0))
    np.testing.assert_array_equal(weighted.y[:, 0], np.arange(100.0, 106))


def test_tallies_add_up():
    one = Tally(10, 2, {"a": 2, "b": 1}, 1, frozenset({"a"}))
    assert one + Tally(5, 1, {"b": 1}, 0, frozenset({"c"})) == Tally(15, 3, {"a": 2, "b": 2}, 1, frozenset({"a", "c"}))
    assert one + Tally() == one


@given(st.integers(0, 2**40), st.integers(1, 500), st.integers(0, 2**70), st.floats(0.01, 0.99))
def test_a_subset_depends_on_position_and_seed_alone(start, length, seed, fraction):
    subset = Subset(fraction, seed, 0, complement=False)
    whole = subset.holds(start, start + length)
    for cut_at in (0, length // 3, length):
        parts = [subset.holds(start, start + cut_at), subset.holds(start + cut_at, start + length)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(Subset(fraction, seed, 0, complement=True).holds(start, start + length), ~whole)


def test_a_subset_has_its_share_and_seeds_are_independent():
    n, fraction = 200_000, 0.1
    first, second = (Subset(fraction, seed, 0, complement=False).holds(0, n) for seed in (0, 1))
    spread = 5 * math.sqrt(fraction * (1 - fraction) / n)
    assert abs(first.mean() - fraction) < spread
    assert abs((first & second).mean() - fraction**2) < spread


def test_bytes_are_shown_for_people():
    assert [format_bytes(size) for size in (0, 1500, 10**16)] == ["0 B", "1.5 kB", "10.0 PB"]
