"""The releases of Transformers that DeltaNet was tried with.

Every file that is an entry (the package, or either file that `trust_remote_code=True` reads first) imports this one
before anything that another release may lack. pyproject.toml states the same range.
"""

import warnings

import transformers


OLDEST, NEWEST = "5.23.0", "5.24.0"


def check_transformers(installed: str) -> None:
    """Refuse a release that is too old, warn of one that is too new; a patch of a release that was tried counts as
    tried.

    Raises:
        ImportError: a release before the oldest.
    """
    oldest, newest, release = (tuple(map(int, version.split(".")[:2])) for version in (OLDEST, NEWEST, installed))
    tried = f"tried with transformers {OLDEST} to {NEWEST}"
    if release < oldest:
        raise ImportError(f"DeltaNet needs transformers {OLDEST} or later ({tried}), found {installed}")
    if release > newest:
        warnings.warn(
            f"DeltaNet was {tried}, found {installed}: compare what it generates with and without `use_cache=True`",
            stacklevel=2,
        )


check_transformers(transformers.__version__)
