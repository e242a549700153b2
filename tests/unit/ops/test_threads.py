"""Work in several threads at once: results in order, the first error when all have ended, shares without a gap."""

import threading
import time

import paddle
import pytest

from aquila_pd.ops import threads


@pytest.fixture(autouse=True)
def three_threads():
    threads.use(3)
    yield
    threads.use(1)


def test_results_are_in_the_order_of_works():
    def work(number, seconds):
        time.sleep(seconds)
        return number, threading.get_ident()

    found = threads.together([lambda n=n: work(n, 0.05 * (3 - n)) for n in range(3)])
    assert [number for number, _ in found] == [0, 1, 2]
    assert len({ident for _, ident in found}) == 3


def test_the_first_error_in_order_is_raised_when_all_have_ended():
    ended = []

    def fails(number, seconds):
        time.sleep(seconds)
        ended.append(number)
        raise KeyError(number)

    with pytest.raises(KeyError, match="0"):
        threads.together([lambda: fails(0, 0.0), lambda: fails(1, 0.1)])
    assert ended == [0, 1]
    assert threads.together([lambda: 1, lambda: 2]) == [1, 2], "and the threads work again"


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_kept_for_a_backward_pass(count):
    weight = paddle.ones([2], "float32")
    weight.stop_gradient = False
    found = threads.together([lambda: weight * 2] * count)
    assert all(tensor.stop_gradient for tensor in found)
    assert paddle.is_grad_enabled()


@pytest.mark.parametrize(("size", "expected"), [(7, [(0, 2), (2, 4), (4, 7)]), (2, [(0, 1), (1, 2)]), (0, [(0, 0)])])
def test_shares_are_about_equal_and_leave_nothing_out(size, expected):
    assert [(share.start, share.stop) for share in threads.shares(size)] == expected


def test_who_has_one_thread_has_one_share():
    with threads.one():
        assert threads.shares(9) == [slice(0, 9)]
