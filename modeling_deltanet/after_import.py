"""Tells another library of this model type when that library is imported, and not before.

PEFT takes seconds to import, and brings in bitsandbytes, which prints: whoever does not use it should not wait for it.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module `name`: at once if it is imported already, otherwise at the end of its import."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


class _AfterImport(MetaPathFinder):
    """Finds one module once, as the other finders do, with a loader that calls `then` at its end."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_tell(module: ModuleType) -> None:
                load(module)
                self.then(module)

            spec.loader.exec_module = load_and_tell
        return spec
