import os
import signal
import time

import pytest

from dnnlib.ordered_pool import num_cores, ordered_map


def slow_at_first(x):
    time.sleep(0.03 if x < 3 else 0)
    return x * x


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers):
    assert list(ordered_map(slow_at_first, iter(range(500)), workers)) == [
        x * x for x in range(500)]
    assert list(ordered_map(slow_at_first, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_items_are_taken_a_bounded_number_ahead(workers):
    taken = []
    items = (taken.append(i) or i for i in range(10**6))
    results = ordered_map(abs, items, workers)
    for i in range(200):
        assert next(results) == i
        assert len(taken) - i <= 64 * (4 * workers + 1) + 1
    results.close()


def fail_at_70(x):
    if x == 70:
        raise ValueError("seventy")
    return x


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_function_raises_arrives(workers):
    with pytest.raises(ValueError, match="seventy"):
        list(ordered_map(fail_at_70, range(500), workers))


def kill_itself(x):
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def test_a_killed_worker_is_an_error_that_says_what_to_try():
    with pytest.raises(OSError, match="killed.*--workers=1"):
        list(ordered_map(kill_itself, range(20), 2))


def test_this_process_has_a_core():
    assert 1 <= num_cores() <= os.cpu_count()
