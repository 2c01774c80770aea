"""What `test_quality.py` runs in processes of its own, which start sooner without torch."""

import time


def slow_square(cell: dict) -> dict:
    time.sleep(cell["x"])
    if cell["x"] == 0.25:
        raise ValueError("this one fails")
    return {"square": cell["x"] ** 2}
