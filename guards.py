"""What stands around the predictor in Cog's server: the watchdog, and the sweeping of what Cog leaves."""

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

    @contextmanager
    def request(self) -> Iterator[None]:
        """Within, a request runs."""
        with self._watchdog.request():
            self._leftovers.sweep()
            yield
