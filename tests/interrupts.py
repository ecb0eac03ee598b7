"""Exceptions at any line, as Cog's cancelling raises them."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


class CancelledError(BaseException):
    """As Cog's own is: no `Exception`, and raised wherever the code happens to be."""


@contextmanager
def interrupted_at(line: int, modules: Collection[ModuleType], functions: Collection[str] = ()) -> Iterator[None]:
    """Raise `CancelledError` at the `line`-th line of these modules that this thread runs from here on, or of these
    functions in them; 0: never. What is raised ends here."""
    files, left = {module.__file__ for module in modules}, line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        code = frame.f_code
        if code.co_filename not in files or (functions and code.co_name not in functions):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise CancelledError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
