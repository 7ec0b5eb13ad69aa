"""Datasets of the Hugging Face Hub as streams of records, pinned to a commit."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.utils import tqdm

from hf_context_prune.errors import DataError
from hf_context_prune.storage.hub_errors import explain_hub_error
from hf_context_prune.utils.hub_ids import is_hub_id

from .records import OpenedSource, Record, Table

PRESETS: dict[str, tuple[str, str | None, str, str | None]] = {
    "mini-gpts-medicine": ("Laurent1/MedQuad-MedicalQnADataset_128tokens_max", None, "train", "text"),
    "mini-gpts-law": ("lexlms/legal_lama", "us_terms+us_crimes+contract_sections", "test", "text"),
    "mini-gpts-translation": ("zetavg/coct-en-zh-tw-translations-twp-300k", None, "train", "en,ch"),
    "mini-gpts-wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
}
"""Datasets on which the code of "Mini-GPTs" (arXiv 2312.12682, its ``dataset.py``) calibrates, by name of the preset.

Each is (dataset id, config, split, text_column). The law set is three configs one after the other ("+"). The Skyrim and
economics sets are CSV files of other repositories, not Hub datasets, and so have no preset.
"""
HUB_MAX_DOCUMENTS = 20_000
"""Number of documents after which a Hub stream ends, unless ``max_documents`` is given."""

_REFERENCE = re.compile(r"(?P<id>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")


def open_hub(reference: str, seed: int) -> OpenedSource:
    """Open a preset or a Hub dataset as a stream, pinned to a commit.

    Args:
        reference: Name of a preset, or ``id[:config[+config...]][@split]``.
        seed: Order of the records of a dataset without a ``doc`` column.

    Raises:
        DataError: The name is none of these, or the Hub does not give the dataset.
    """
    text_column: str | None = None
    if reference in PRESETS:
        dataset_id, configs, split, text_column = PRESETS[reference]
    elif (match := _REFERENCE.fullmatch(reference)) is not None and is_hub_id(match["id"], with_owner=False):
        dataset_id, configs, split = match["id"], match["config"], match["split"] or "train"
    else:
        raise DataError(
            f"{reference!r} is neither a file, nor a Hub dataset id (id[:config][@split]), nor a preset "
            f"({', '.join(PRESETS)})"
        )
    tables = []
    try:
        revision, streams = _hub_streams(dataset_id, configs.split("+") if configs else [None], split)
        for config, stream in streams:
            # Records of a document must stay in order; others are shuffled, as datasets are often sorted by topic.
            if "doc" not in (stream.column_names or next(iter(stream.take(1)), {})):
                stream = stream.shuffle(seed=seed, buffer_size=1000)
            name = dataset_id if config is None else f"{dataset_id}:{config}"
            tables.append(Table(_hub_records(reference, stream), name, name))
    except Exception as error:
        raise _hub_error(reference, error) from error
    name = f"{dataset_id}{f':{configs}' if configs else ''}@{split}"
    return OpenedSource(tables, name, revision, text_column, HUB_MAX_DOCUMENTS)


def _hub_streams(
    dataset_id: str, configs: Sequence[str | None], split: str
) -> tuple[str, list[tuple[str | None, Any]]]:
    """Pin a dataset to a commit.

    Returns:
        (commit sha, [(config, stream), ...]).
    """
    api = HfApi()
    revision = str(api.dataset_info(dataset_id).sha)
    try:
        return revision, [
            (config, load_dataset(dataset_id, config, split=split, revision=revision, streaming=True))
            for config in configs
        ]
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    # For a dataset with a loading script, such as LegalLAMA, the Hub keeps an export to Parquet: one folder per config.
    revision = str(api.dataset_info(dataset_id, revision="refs/convert/parquet").sha)
    return revision, [
        (config, load_dataset(dataset_id, data_dir=config or "default", split=split, revision=revision, streaming=True))
        for config in configs
    ]


def _hub_records(reference: str, stream: Iterable[Record]) -> Iterator[Record]:
    try:
        yield from tqdm(stream, desc=f"Reading {reference}", unit=" records", name="hf_context_prune.data")
    except Exception as error:
        raise _hub_error(reference, error) from error


def _hub_error(reference: str, error: Exception) -> DataError:
    missing = (
        f"there is no such file, preset or public Hub dataset; check the spelling (presets: {', '.join(PRESETS)}), or "
        f"log in with `hf auth login` if it is private"
    )
    unreachable = (
        "there is no such file, and the Hub can't be reached; check the path, or the network and HF_HUB_OFFLINE, or "
        "give a local file"
    )
    own = {
        "missing": missing,
        **dict.fromkeys(("offline", "unreachable"), unreachable),
        "busy": "the Hub does not respond; try again in some minutes",
        "other": "the Hub dataset can't be read; check config and split (id[:config][@split])",
    }
    kind: str | None
    if isinstance(error, DatasetNotFoundError):  # of `datasets`, which names a gated repository in its message alone
        kind = "gated" if "gated" in str(error) else "missing"
    else:
        kind = "busy" if "LocalEntryNotFoundError" in str(error) else None  # raised by `datasets` for a 503
    why = explain_hub_error(error, own, kind=kind)
    return DataError(f"{reference}: {why} ({type(error).__name__}: {error})")
