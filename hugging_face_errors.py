"""What Hugging Face's refusals mean for a person. Each text goes on where the name of the repo ends."""

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

GATED = "is gated: accept its licence on its page and set HF_TOKEN to a token of that account"


def refusal(error: Exception, token: str | None) -> str | None:
    """Why a repo is not given to who asks with `token`; None for an error that says nothing of the repo itself."""
    hint = "the HF_TOKEN that is set does not open it" if token else "HF_TOKEN is needed"
    if isinstance(error, GatedRepoError):
        return GATED
    if isinstance(error, RepositoryNotFoundError):
        return f"cannot be opened: there is no such repo, or it is private and {hint}"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, HFValidationError):
        return "is not a valid repo id"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"is private or needs an account (Hugging Face answers {error.response.status_code}); {hint}"
    return None
