"""Reaching the Hugging Face Hub, or finding out within seconds that it cannot be reached."""

import functools

from huggingface_hub import constants, get_session

_PATIENCE = 5.0  # seconds


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


def looks_like_path(name: str) -> bool:
    """Whether a name can only be meant as a path: Hub names have at most one slash and no such start."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
