"""Calls back once a module has been imported, by whoever it was."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds one module as the rest of the import system does.

    It calls back once the module has been executed.
    """

    def __init__(self, name: str, callback: Callable[[], object]) -> None:
        self.name, self.callback, self.searching = name, callback, False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        self.searching = True  # the search below asks this finder too
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.callback()

            spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def when_imported(name: str, callback: Callable[[], object]) -> None:
    """Calls `callback` now if the module `name` has been imported, else as soon as it is.

    For registrations with modules that are slow to import: torch.utils.flop_counter takes 0.2 s and
    brings Triton.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _OnImport(name, callback))
