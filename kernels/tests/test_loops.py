"""Compiled loops: any number of threads, after a fork, pickled, without a place for a cache."""

from __future__ import annotations

import multiprocessing
import os
import pickle

import pytest
import torch

from unweave.kernels.loops import GRAIN, Loop

pytest.importorskip("numba")


@Loop
def row_sums(first, last, x, sums):
    """Write the sum of each row."""
    for row in range(first, last):
        total = 0.0
        for column in range(x.shape[1]):
            total += x[row, column]
        sums[row] = total


def summed(x):
    sums = x.new_empty(len(x))
    row_sums(*x.shape, x, sums)
    return sums


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 7, 5000])
def test_every_row_is_visited_once_whatever_the_threads(threads, rows):
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    threads(1)
    alone = summed(x)
    threads(5)
    assert torch.equal(summed(x), alone)
    torch.testing.assert_close(alone, x.sum(1))


def test_uneven_parts_are_given_by_their_bounds():
    x, sums = torch.ones(10, 2), torch.zeros(10)
    row_sums.over([0, 1, 1, 8], x, sums)
    assert sums.tolist() == [2.0] * 8 + [0.0] * 2


def test_an_error_in_a_thread_is_raised():
    failing = Loop(row_sums.function)
    failing.compiled = lambda first, last, *arrays: 1 / 0
    with pytest.raises(ZeroDivisionError):
        failing(2, GRAIN, torch.ones(2, 2), torch.ones(2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_loops_work_in_a_forked_process_after_the_parent_used_threads(threads):
    threads(2)
    x = torch.ones(4096, 16)
    summed(x)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_sums_by_two_threads) == [16.0] * 8


def _sums_by_two_threads():
    """Small tensors: torch's own threads do not survive a fork."""
    sums = torch.empty(8)
    row_sums.over([0, 4, 8], torch.ones(8, 16), sums)
    return sums.tolist()


def test_a_loop_is_pickled_by_name():
    assert pickle.loads(pickle.dumps(row_sums)) is row_sums


def test_no_place_for_a_cache_is_no_error(monkeypatch):
    import numba

    compile_with = numba.njit

    def refusing(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compile_with(*arguments, **options)

    monkeypatch.setattr(numba, "njit", refusing)
    sums = torch.empty(2)
    Loop(row_sums.function)(2, 3, torch.ones(2, 3), sums)
    assert sums.tolist() == [3.0, 3.0]
