"""What the environment variable DELTANET_KERNELS leaves out, so that a wrong result can be bisected in minutes.

It is read once, when the package is imported: "off", or a list of words such as "no-gluon,no-segments".
"""

import logging
import os


WORDS = {
    "off": "the model computes with torch",
    "check": "calls read borders and indices, and refuse values that are not finite: waits for the GPU",
    "no-gluon": "Hopper's kernels in Gluon; the Triton kernels compute",
    "no-segments": "long sequences cut into segments",
    "no-beside": "gradients that start while the reverse scan runs",
    "no-replay": "calls played from a tape of launches",
    "explain": "logs for each kind of call which kernels run, with which tiles, and why",
}


def parse(text: str) -> frozenset[str]:
    """The words of a list; ValueError for one that is not known."""
    words = frozenset(word.strip() for word in text.split(",") if word.strip())
    if unknown := sorted(words - WORDS.keys()):
        raise ValueError(f"DELTANET_KERNELS must be a list of {', '.join(WORDS)}, got {', '.join(unknown)}")
    return words


TEXT = os.environ.get("DELTANET_KERNELS", "")
CHOSEN = parse(TEXT)
if CHOSEN:
    logging.getLogger(__name__).warning("DELTANET_KERNELS=%s", TEXT)


def uses(feature: str) -> bool:
    """Whether a feature of WORDS is left in."""
    return f"no-{feature}" not in CHOSEN


CHECKS = "check" in CHOSEN
EXPLAINS = "explain" in CHOSEN
