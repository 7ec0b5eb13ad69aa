"""Downloads of a model from the Hub at one commit, never of a pickle."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_context_prune.errors import LoadError
from hf_context_prune.modeling.weights_header import list_shards
from hf_context_prune.utils.file_names import PROCESSOR_FILES

from .hub_errors import explain_hub_error

CONVERT = (
    "Convert them to safetensors once, where you trust them: from_pretrained(...).save_pretrained(...) of "
    "AutoModelForCausalLM."
)
"""The remedy for weights that are saved as a pickle."""


def fetch_config(source: str, revision: str | None) -> Path:
    """Fetch a Hub model's config, and return its folder in the cache, whose name is the commit.

    Everything else of the model is then read at this commit.

    Args:
        source: Hub id.
        revision: Branch, tag or commit.

    Raises:
        LoadError: The repository can't be read or has no config.json.
    """
    try:
        return Path(hf_hub_download(source, "config.json", revision=revision)).parent
    except RemoteEntryNotFoundError as error:
        raise LoadError(
            f"{source!r} has no config.json on the Hub, so it is not a model of transformers. Of a GGUF repository, "
            f"download the .gguf file and pass its path; of an adapter, merge it into its model first."
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        raise _explain(source, revision, error) from error


def fetch_weights(source: str, commit: str) -> None:
    """Fetch a Hub model's weights before transformers does, so that their headers can be compared with the config.

    Transformers takes any failure of this download (no network, an overloaded Hub) for a missing file, and then
    advises to load the pickle.

    Raises:
        LoadError: The download failed, or the repository holds no safetensors weights.
    """
    failure: Exception | None = None
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            path = hf_hub_download(source, name, revision=commit)
            if name == SAFE_WEIGHTS_INDEX_NAME:
                snapshot_download(source, revision=commit, allow_patterns=_list_shards(source, path))
            return
        except LoadError:
            raise
        except RemoteEntryNotFoundError:
            continue
        except (OSError, ValueError, HTTPError) as error:
            failure = error
    if failure is not None:
        raise _explain(source, commit, failure) from failure
    raise LoadError(
        f"{source!r} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} at commit {commit}. Weights "
        f"saved as a pickle (pytorch_model.bin) can run any code when they are loaded, and are refused. {CONVERT}"
    )


def fetch_processor(source: str, commit: str) -> None:
    """Fetch the files of a Hub model's processor of images, which are copied beside the pruned model.

    Raises:
        LoadError: The download failed.
    """
    try:
        snapshot_download(source, revision=commit, allow_patterns=list(PROCESSOR_FILES))
    except (OSError, ValueError, HTTPError) as error:
        raise _explain(source, commit, error) from error


def _list_shards(source: str, index: str) -> list[str]:
    try:
        return list_shards(index)
    except ValueError as error:
        raise LoadError(f"{source!r} can't be loaded: {error}") from error


def _explain(source: str, revision: str | None, error: Exception) -> LoadError:
    incomplete = (
        "there is no such folder here, and as a Hub id it is not complete in the cache and can't be fetched; check the "
        "spelling, the network and HF_HUB_OFFLINE, or try again later"
    )
    why = explain_hub_error(
        error,
        {
            "missing": "it is neither a local folder or file nor a public model on the Hub; check the spelling, or log "
            "in with `hf auth login` if it is private",
            "revision": f"it has no branch, tag or commit {revision!r} on the Hub",
            "invalid": "it is neither a local folder or file nor a Hub id (owner/name)",
            **dict.fromkeys(("offline", "unreachable", "busy", "other"), incomplete),
        },
    )
    return LoadError(f"{source!r} can't be read: {why} ({type(error).__name__}: {error})")
