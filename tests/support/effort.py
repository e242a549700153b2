"""How much the tests try: what `make test` has time for, or with AQUILA_PD_TEST_THOROUGH=1 many times as much."""

import os

THOROUGH = bool(os.environ.get("AQUILA_PD_TEST_THOROUGH"))


def tries(quick: int, thorough: int) -> int:
    """How many examples, schedules or moments a test goes through."""
    return thorough if THOROUGH else quick
