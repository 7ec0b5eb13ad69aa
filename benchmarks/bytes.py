"""Measure what a byte of a file buys: quantised base models beside pruned ones, at every size that llama.cpp runs.

python -m benchmarks.bytes --data PATH/TO/data            # medicine, four sizes; two hours; resumes
python -m benchmarks.bytes --data PATH/TO/data --quick    # one size, three data types, little text

The weights of every file are read back and scored by PyTorch: llama.cpp has the same weights, and rounds what they read,
too, which `export` compares on a smaller text. Speed is llama.cpp's own, in turns with the base model; all speeds are
measured after all losses, in a few minutes, because only they need an idle machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

import gguf as library
import torch
from gguf import GGUFReader

from benchmarks.by_source import read_sources, sources_of
from benchmarks.bytes_text import REFERENCE, Key, draw, results_text
from benchmarks.common import Rows, parse_compared, parser, plot_path, write_section
from benchmarks.frontier import FrontierDomain
from benchmarks.frontier_text import BASE, HEALED
from benchmarks.methods import DEFAULT, documents_of, rounded
from benchmarks.models import smollm2
from hf_context_prune.errors import PruningWarning
from hf_context_prune.export import gguf
from hf_context_prune.export.llama_cpp import LlamaCppRuntime
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.storage.loading import LoadedModel

DTYPES = {
    BASE: ("f16", "q8_0", "q6_k", "q4_k_m", "q3_k_m", "q2_k"),
    DEFAULT: ("f16", "q8_0", "q6_k", "q4_k_m"),
    HEALED: ("f16", "q8_0", "q6_k", "q4_k_m"),
}
"""Data types of the files, by what was done to the model."""
QUICK = ("f16", "q8_0", "q4_k_m")
_PROMPT, _NEW_TOKENS, _TURNS = 32, 64, 5
LOSS, SPEED = "loss", "speed"


def read_back(file: Path, model: Any) -> None:
    """Give a Llama, in place, the weights that a file holds of it."""
    geometry = read_geometry(model.config, spec_of(model.config))
    reader = GGUFReader(file)
    arch = library.MODEL_ARCH.DECI if "deci.block_count" in reader.fields else library.MODEL_ARCH.LLAMA
    names = library.get_tensor_name_map(arch, len(geometry.layers))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with torch.no_grad():
        for name, value in model.named_parameters():
            found = tensors.get(names.get_name(name, try_suffixes=(".weight", ".bias")) or "")
            if found is None:  # the head, where it is the embedding
                continue
            read = torch.from_numpy(library.quants.dequantize(found.data, found.tensor_type).copy()).float()
            if any(f".{role}_proj." in name for role in "qk"):  # llama.cpp rotates neighbours
                pairs = read.unflatten(0, (-1, geometry.head_dim // 2, 2))
                read = pairs.transpose(1, 2).reshape(read.shape)
            value.copy_(read[tuple(slice(size) for size in value.shape)])  # less the neurons that fill it up


def write_file(loaded: LoadedModel, dtype: str, folder: Path) -> Path:
    """Write a model as GGUF, and return the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)  # rows that blocks don't divide: the bytes are counted
        gguf.write(loaded, folder, dtype)
    return folder / gguf.FILE_NAME


class BytesDomain(FrontierDomain):
    """A domain whose models are written to files, scored and timed; `frontier` leaves them, where it ran before."""

    def models(self, share: float) -> Iterator[tuple[str, LoadedModel]]:
        """Yield what was done and the model: the base model at 0, else the pruned one and the same trained back."""
        if not share:
            yield BASE, self.load()
            return
        model, tokenizer, _ = self.pruned(DEFAULT, share)
        yield DEFAULT, LoadedModel(model, tokenizer, DEFAULT, None, None)
        yield HEALED, LoadedModel(*self.healed(share)[:2], HEALED, None, None)
        self.forget()

    def measure_loss(self, loaded: LoadedModel, dtype: str, base: Mapping[str, Any] | None) -> dict[str, Any]:
        """Write a file, and score its weights on test text and general text."""
        with tempfile.TemporaryDirectory() as folder:
            file = write_file(loaded, dtype, Path(folder))
            row: dict[str, Any] = {"bytes": file.stat().st_size, "parameters": loaded.model.num_parameters()}
            kept = {name: value.detach().clone() for name, value in loaded.model.named_parameters()}
            try:
                read_back(file, loaded.model)
                return row | self._score(loaded, base)
            finally:
                with torch.no_grad():
                    for name, value in loaded.model.named_parameters():
                        value.copy_(kept[name])

    def _score(self, loaded: LoadedModel, base: Mapping[str, Any] | None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        texts = {"domain": self.test_text[0]} | ({"general": self.general} if self.name == self.args.compared else {})
        for key, source in texts.items():
            docs = None if base is None else [doc for doc, _, _ in base[key]["documents"]]
            losses = self.losses(loaded.model, loaded.tokenizer, docs, source=source)
            row[key] = {"nll": rounded(losses)} | ({"documents": documents_of(losses)} if base is None else {})
        return row


def time_in_turns(base: Path, file: Path, threads: int) -> list[list[float]]:
    """Return the decode speed of two files in llama.cpp, in tokens per second, by turn; the first turn warms up."""
    prompt = [100 + index for index in range(_PROMPT)]
    with ExitStack() as stack:
        runtimes = [
            stack.enter_context(closing(LlamaCppRuntime(one, threads=threads, positions=_PROMPT + _NEW_TOKENS + 2)))
            for one in (base, file)
        ]
        turns = [
            [_NEW_TOKENS / runtime.time_generation([prompt], _NEW_TOKENS)[1] for runtime in runtimes]
            for _ in range(_TURNS + 1)
        ]
    return turns[1:]


class BytesRows:
    """The rows of a run, by (domain, what was done, share, data type); each is measured or found on disk.

    Args:
        args: Options of the run.
        domains: The domains, by name.
    """

    def __init__(self, args: argparse.Namespace, domains: Mapping[str, BytesDomain]) -> None:
        self.args, self.domains = args, domains
        self.store = Rows(args, "bytes", seed=args.seed)
        self.found: dict[Key, dict[str, Any]] = {}

    def places(self) -> Iterator[tuple[str, float, list[tuple[str, str]]]]:
        """Yield domain, share and files (what was done, data type) of every model that is pruned, the base model first."""
        for name in self.domains:
            for share in (0.0, *(self.args.shares if name == self.args.compared else (self.args.other_share,))):
                forms = (DEFAULT, HEALED) if share else (BASE,)
                yield name, share, [(form, dtype) for form in forms for dtype in self.args.dtypes[form]]

    def key(self, what: str, name: str, form: str, share: float, dtype: str) -> dict[str, Any]:
        """Return the key of a row: all that decides it. The base model is as fast in every domain."""
        args = self.args
        key = {"what": what, "form": form, "share": share, "dtype": dtype}
        if what == LOSS or share:
            key["domain"] = name
        if what == LOSS:
            key["eval_tokens"] = args.eval_tokens
            key |= {"general": args.general_tokens} if name == args.compared else {}
        else:
            key["threads"] = args.threads
        if share:
            key |= {"blocks": args.num_samples, "length": args.length, "seed": args.seed}
        return key | ({"minutes": args.minutes} if form == HEALED else {})

    def get_all(self) -> dict[Key, dict[str, Any]]:
        """Return all rows: losses first, then speeds."""
        self._get(LOSS, self._measure_loss)
        with tempfile.TemporaryDirectory() as folder:

            @cache
            def base_file() -> Path:
                return write_file(next(iter(self.domains.values())).load(), REFERENCE, Path(folder))

            def measure(key: Key, loaded: LoadedModel) -> dict[str, Any]:
                with tempfile.TemporaryDirectory() as own:
                    file = write_file(loaded, key[3], Path(own))
                    return {"turns": time_in_turns(base_file(), file, self.args.threads)}

            self._get(SPEED, measure)
        known = read_sources(self.args, [*self.domains, "general"])
        for name in self.domains:
            base = self.found[name, BASE, 0.0, REFERENCE]
            for text in {"domain", "general"} & base.keys():
                base[text]["sources"] = sources_of(base[text], known[name if text == "domain" else text])
        return self.found

    def _measure_loss(self, key: Key, loaded: LoadedModel) -> dict[str, Any]:
        name, base = key[0], self.found.get((key[0], BASE, 0.0, REFERENCE))
        return self.domains[name].measure_loss(loaded, key[3], base)

    def _get(self, what: str, measure: Callable[[Key, LoadedModel], dict[str, Any]]) -> None:
        for name, share, files in self.places():
            keys = {(name, form, share, dtype): self.key(what, name, form, share, dtype) for form, dtype in files}
            if any(self.store.find(key) is None for key in keys.values()):
                for form, loaded in self.domains[name].models(share):
                    for place, key in keys.items():
                        if place[1] == form:
                            self.store.get_or_measure(key, lambda place=place, loaded=loaded: measure(place, loaded))
            for place, key in keys.items():
                row = self.store.find(key)
                assert row is not None
                earlier = self.found.get(place, {"settings": []})
                self.found[place] = {**earlier, **row, "settings": [*earlier["settings"], row["setting"]]}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "", several=True)
    options.set_defaults(domains=["medicine", "law"])
    options.add_argument("--quick", action="store_true", help="one domain, one size, three data types, little text")
    options.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5], help="parameters to remove")
    options.add_argument("--compared", default="medicine", help="domain with all shares")
    options.add_argument("--other-share", type=float, default=0.3, help="share of the other domains")
    options.add_argument("--minutes", type=float, default=8.0, help="minutes of training")
    options.add_argument("--num-samples", type=int, default=64, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=48_000, help="at most this many test tokens per domain")
    options.add_argument("--general-tokens", type=int, default=16_000, help="at most this many tokens of general text")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of llama.cpp")
    if "--quick" in arguments:
        options.set_defaults(domains=["medicine"], shares=[0.3], minutes=1.0, num_samples=16)
        options.set_defaults(eval_tokens=4_000, general_tokens=4_000)
    args = parse_compared(options, arguments)
    args.dtypes = dict.fromkeys(DTYPES, QUICK) if args.quick else DTYPES
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    load: Callable[[], Any] = cache(smollm2)
    domains = {name: BytesDomain(load, args, name, targets=("mlp",)) for name in args.domains}
    found = BytesRows(args, domains).get_all()
    section = "bytes_quick" if args.quick else "bytes"
    picture = plot_path(section)
    draw(found, args, picture)
    write_section(section, results_text(found, args, picture))


if __name__ == "__main__":
    main()
