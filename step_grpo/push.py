"""Puts an export on the Hugging Face Hub.

The token is the one of `hf auth login` or of the environment variable HF_TOKEN. It is handed to the Hub's own
client and appears in no message.
"""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from step_grpo import paths
from step_grpo.errors import UserError

FLAG = "--push-to-hub"
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors")
"""Of an earlier upload they would be loaded in place of the new ones, or beside them."""


def check(name: str) -> None:
    """Finds out before any work is done whether a push can be tried.

    Raises:
        UserError: the name is none, or there is no token.
    """
    try:
        validate_repo_id(name)
        owner, _, model = name.partition("/")
    except HFValidationError as error:
        raise UserError(f"{FLAG}={name}: {str(error).rstrip('.')}") from None
    if not (owner and model):
        raise UserError(f"{FLAG}={name}: name the owner too, as in USER/{name}")
    if get_token() is None:
        raise UserError(
            f"{FLAG}={name}: no token; run `hf auth login`, or set HF_TOKEN to one that may write"
        )


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads an export in one commit, to a repository that is made if it is not there.

    Args:
        folder: the export.
        name: OWNER/MODEL.
        private: nobody else may see it.

    Returns:
        The address of the commit.

    Raises:
        UserError: `check` fails, the Hub refuses or is not reached, or the model is to be private and is not.
    """
    check(name)
    api = HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(
                f"{FLAG}={name}: this model is there already and is public; make it private in its settings, "
                "or leave out --private"
            )
        done = api.upload_folder(
            repo_id=name,
            folder_path=paths.fetched(folder),
            commit_message="Upload a model trained with Step-GRPO",
            delete_patterns=list(WEIGHTS),
        )
    except HfHubHTTPError as error:
        raise UserError(f"{FLAG}={name}: {_refusal(error)}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{FLAG}={name}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from None
    except UserError:
        raise
    except Exception as error:  # of the network, and of whatever moves the large files
        raise UserError(f"{FLAG}={name}: the upload failed ({_harmless(error)})") from None
    return str(done)


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())[:300]
    hint = {
        401: "; the token is not valid: run `hf auth login` again",
        403: "; the token needs the right to write there",
    }.get(status, "")
    return f"the Hub refuses with {status}{f' ({said})' if said else ''}{hint}"


def _harmless(error: Exception) -> str:
    """What went wrong; without the text where that may quote the request, and with it the token."""
    text, token = " ".join(str(error).split())[:300], get_token()
    if not text or "Bearer" in text or (token and token in text):
        return type(error).__name__
    return f"{type(error).__name__}: {text}"
