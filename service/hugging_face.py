"""What Hugging Face's refusals mean for a person. Each text goes on where the name of the repo ends."""

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FETCH_ERRORS = (
    HFValidationError,
    httpx2.HTTPError,
    OSError,
)  # what Hugging Face's client raises; HfHubHTTPError is one

GATED = "is gated: accept its licence on its page and set HF_TOKEN to a token of that account"
KINDS = {  # of huggingface_hub's errors, and the codes in the answers from which it makes them
    GatedRepoError: "GatedRepo",  # a kind of RepositoryNotFoundError
    RepositoryNotFoundError: "RepoNotFound",
    RevisionNotFoundError: "RevisionNotFound",
}


def refusal(error: Exception, token: str | None) -> str | None:
    """Why a repo is not given to who asks with `token`; None for an error that says nothing of the repo itself."""
    if isinstance(error, HFValidationError):
        return "is not a valid repo id"
    for kind, code in KINDS.items():
        if isinstance(error, kind):
            return refusal_of(code, 0, token)
    return refusal_of("", error.response.status_code, token) if isinstance(error, HfHubHTTPError) else None


def refusal_of(code: str, status: int, token: str | None) -> str | None:
    """The same, of an answer with this status and this `X-Error-Code` header."""
    hint = "the HF_TOKEN that is set does not open it" if token else "HF_TOKEN is needed"
    if code == "GatedRepo":
        return GATED
    if code == "RepoNotFound":
        return f"cannot be opened: there is no such repo, or it is private and {hint}"
    if code == "RevisionNotFound":
        return "has no such revision"
    if status in (401, 403):
        return f"is private or needs an account (Hugging Face answers {status}); {hint}"
    return None


def failure(error: Exception, token: str | None) -> str:
    """Why nothing came of fetching a repo with `token`, one of `FETCH_ERRORS`: the end of a sentence that named it."""
    if isinstance(error, LocalEntryNotFoundError):
        return ", but Hugging Face cannot be reached and its files are not all in the cache"
    if why := refusal(error, token):
        return f", which {why}"
    if isinstance(error, HfHubHTTPError):
        return f", but Hugging Face answered {error.response.status_code}"
    if isinstance(error, httpx2.HTTPError | OfflineModeIsEnabled):
        return ", but Hugging Face cannot be reached"
    reason = error.strerror if isinstance(error, OSError) else None
    return f", but fetching it failed: {reason or type(error).__name__}"
