"""The latency model, which is fitted to the measured durations of batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.tasks.latency_model import CHUNK_ROWS, MAX_REPEATS, LatencyModel


class Network:
    """A fake network and its clock. A batch takes ``seconds(rows)``, and the first of each size takes 0.005 s more."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now, self.seconds, self.sizes = 0.0, seconds, list[int]()

    def measure(self, rows: int) -> LatencyModel:
        return LatencyModel.measure(self, rows, lambda: self.now)

    def __call__(self, rows: int) -> None:
        self.now += self.seconds(rows) + 0.005 * (rows not in self.sizes)
        self.sizes.append(rows)


def test_all_sizes_of_a_fast_network_are_measured() -> None:
    network = Network(lambda rows: 0.001 + 0.0001 * rows)
    model = network.measure(24)
    assert network.sizes == [1] * 12 + [4, 16] + [24] * 4
    assert model(1) == pytest.approx(0.0011)
    assert model(24) == pytest.approx(0.0034)


def test_large_batches_of_a_slow_network_are_extrapolated() -> None:
    network = Network(lambda rows: 0.007 * rows)
    model = network.measure(64)
    assert max(network.sizes) == 4
    assert model(64) == pytest.approx(0.448)


@pytest.mark.parametrize("rows", [4, 16])
def test_several_interrupted_batches_of_one_size_do_not_change_the_model(rows: int) -> None:
    network = Network(lambda size: 0.1 if size == rows and network.sizes.count(rows) < 4 else 0.001 * size)
    assert network.measure(16)(256) == pytest.approx(0.256)


def test_batches_of_one_row_are_repeated_because_the_first_ones_are_slow() -> None:
    network = Network(lambda rows: 0.003 if len(network.sizes) < 3 else 0.001)
    assert network.measure(1).single_row == pytest.approx(0.001)
    assert len(network.sizes) == 2 + MAX_REPEATS


def test_a_network_without_batches_has_one_size() -> None:
    network = Network(lambda rows: 0.03)
    assert network.measure(1) == LatencyModel(pytest.approx(0.03), 0.0)
    assert set(network.sizes) == {1}


def test_fixed_costs_take_at_most_a_third_of_the_time_of_efficient_batches() -> None:
    models = [LatencyModel(0.0005, 0.00002), LatencyModel(0.0015, 0.00004), LatencyModel(0.0009, 0.0009)]
    assert [model.efficient_rows(0.002) for model in models] == [64, 64, CHUNK_ROWS]
    assert LatencyModel(0.001, 0.0).efficient_rows(0.002) >= 10**6
