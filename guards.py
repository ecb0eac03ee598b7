"""What stands around the predictor in Cog's server: the watchdog, and the sweeping of what Cog leaves."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from service.leftovers import Leftovers
from service.watchdog import Watchdog
from settings import Settings


class Guards:
    """Make them at the end of `setup()`."""

    def __init__(self, settings: Settings) -> None:
        self._leftovers = Leftovers()
        self._watchdog = Watchdog(settings.request_timeout, settings.input_timeout)
        # What is loaded by now stays as long as the process. Looking through it for garbage again would make requests
        # wait, and take a second at the end.
        gc.collect()
        gc.freeze()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Within, a request runs."""
        with self._watchdog.request():
            self._leftovers.sweep()
            yield
