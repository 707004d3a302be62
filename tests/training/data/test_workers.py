import os
import signal
import time

import pytest

from training.data.workers import DeadUnit, run_units


def square(number):
    return number * number


def die_once(marker):
    """Die the first time, with the marker file as memory."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die_on_seven(number):
    if number == 7:
        os._exit(3)
    return number


def hang_on_seven(number):
    if number == 7:
        time.sleep(600)
    return number


def fail(number):
    raise OSError(28, "No space left on device", f"out/{number}")


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_unit_is_done_once(num_workers):
    results = dict(run_units(square, range(7), num_workers))
    assert results == {n: n * n for n in range(7)}


def test_a_process_that_dies_costs_an_attempt_not_the_unit(tmp_path):
    units = [tmp_path / "a", tmp_path / "b"]
    assert dict(run_units(die_once, units, 1)) == dict.fromkeys(units, "done")


def test_a_unit_that_kills_its_process_is_named_and_the_rest_is_done():
    results = dict(run_units(die_on_seven, range(5, 10), 2))
    assert {n: r for n, r in results.items() if n != 7} == {5: 5, 6: 6, 8: 8, 9: 9}
    assert results[7] == DeadUnit(
        "its process died (3): a crash, or no memory, in each of 2 attempts"
    )


@pytest.mark.slow
def test_a_unit_that_hangs_is_named_and_the_rest_is_done():
    results = dict(run_units(hang_on_seven, range(6, 9), 2, timeout_s=4.0))
    assert (results[6], results[8]) == (6, 8)
    assert "did not answer in time" in results[7].reason


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_is_raised_here_as_it_was_there(num_workers):
    with pytest.raises(OSError, match=r"No space left on device: 'out/1'"):
        list(run_units(fail, [1], num_workers))


def test_a_negative_number_of_processes_is_refused():
    with pytest.raises(ValueError, match="num_workers is -1"):
        list(run_units(square, [1], -1))
