"""What leaves a request as an error is one sentence, and the log has the rest."""

import logging

import pytest

from service.errors import InputError, UnforeseenError, explained


def fail(error: Exception) -> None:
    with explained(InputError):
        raise error


def test_what_is_foreseen_passes_on_one_line() -> None:
    with pytest.raises(InputError, match=r"^A sentence\.$"):
        fail(InputError("A sentence."))
    with pytest.raises(InputError) as caught:
        fail(InputError("A\x1b[31m\n" * 9999))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "error", [ValueError("int() 10^400"), RecursionError("maximum"), KeyError("k"), MemoryError(), RuntimeError("a\nb")]
)
def test_what_is_unforeseen_is_a_number_that_the_log_explains(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnforeseenError) as caught, caplog.at_level(logging.ERROR):
        fail(error)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    number = sentence.rsplit(maxsplit=1)[-1].rstrip(".")
    (record,) = [record for record in caplog.records if f"error {number}: " in record.getMessage()]
    assert type(error).__name__ in record.getMessage()
    assert "in fail" in record.getMessage()
    assert record.threadName == "errors"  # not the request's, whose lines Cog puts into the answer


def test_the_log_shows_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    secrets = "https://u:pass@h/x?sig=pass Authorization: Bearer pass token=pass"
    with pytest.raises(UnforeseenError), caplog.at_level(logging.ERROR):
        fail(OSError(secrets))
    assert "OSError" in caplog.text
    assert "pass" not in caplog.text
