"""Reaching the Hugging Face Hub, or finding out within seconds that it cannot be reached."""

import functools

from huggingface_hub import constants, get_session

from step_grpo.errors import TransientError, UserError

_PATIENCE = 5.0  # seconds
TOO_MANY = 429  # requests; a later one may be answered
_TOLD = constants.HF_HUB_OFFLINE  # by the user


@functools.cache
def offline() -> bool:
    """Whether to do without the Hub; if so, its client libraries are switched to their offline mode.

    Without a network these libraries retry each file for half a minute and print every attempt. Offline
    they use what is cached and fail at once otherwise. Asked once a process, through their own session, so
    that proxies and a mirror (`HF_ENDPOINT`) count.
    """
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # whatever the HTTP library of the day raises
        constants.HF_HUB_OFFLINE = True
    return constants.HF_HUB_OFFLINE


def failure(error: Exception | None = None) -> type[UserError]:
    """The kind of error where something is neither in the cache nor to be had from the Hub.

    Args:
        error: of the Hub's client, if it was asked.
    """
    status = getattr(getattr(error, "response", None), "status_code", 500)
    refused = 400 <= status < 500 and status != TOO_MANY
    return UserError if _TOLD or refused else TransientError


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a path: Hub names have at most one slash and no such start."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
