"""Measure what a byte of a file buys: quantised base models beside pruned ones, at every size that llama.cpp runs.

python -m benchmarks.bytes --data PATH/TO/data            # medicine, four sizes; resumes; hours
python -m benchmarks.bytes --data PATH/TO/data --quick    # one size, three data types, little text

The weights of every file are read back and scored by PyTorch: llama.cpp has the same weights, and rounds what they read,
too, which `export` compares on a smaller text. Speed is llama.cpp's own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import gguf as library
import torch
from gguf import GGUFReader

from benchmarks.bytes_text import draw, results_text
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
_PROMPT, _NEW_TOKENS, _TIMES = 32, 64, 3


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

    def measure_file(self, loaded: LoadedModel, dtype: str, base: Mapping[str, Any] | None) -> dict[str, Any]:
        """Write a file, score its weights on test text and general text, and time it in llama.cpp."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", PruningWarning)  # rows that blocks don't divide: the bytes are counted
            gguf.write(loaded, Path(folder), dtype)
            file = Path(folder) / gguf.FILE_NAME
            row: dict[str, Any] = {"bytes": file.stat().st_size, "parameters": loaded.model.num_parameters()}
            kept = {name: value.detach().clone() for name, value in loaded.model.named_parameters()}
            try:
                read_back(file, loaded.model)
                row |= self._score(loaded, base)
            finally:
                with torch.no_grad():
                    for name, value in loaded.model.named_parameters():
                        value.copy_(kept[name])
            return row | {"tokens_per_second": time_decoding(file, self.args.threads)}

    def _score(self, loaded: LoadedModel, base: Mapping[str, Any] | None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for key, source in (("domain", self.test_text[0]), ("general", self.general)):
            docs = None if base is None else [doc for doc, _, _ in base[key]["documents"]]
            losses = self.losses(loaded.model, loaded.tokenizer, docs, source=source)
            row[key] = {"documents": documents_of(losses), "nll": rounded(losses)}
        return row


def time_decoding(file: Path, threads: int) -> float:
    """Return the decode speed of a file in llama.cpp, tokens per second: the median of a few measurements."""
    prompt = [100 + index for index in range(_PROMPT)]
    with closing(LlamaCppRuntime(file, threads=threads, positions=_PROMPT + _NEW_TOKENS + 2)) as runtime:
        runtime.time_generation([prompt], 8)
        return statistics.median(_NEW_TOKENS / runtime.time_generation([prompt], _NEW_TOKENS)[1] for _ in range(_TIMES))


def measure(args: argparse.Namespace, domains: Mapping[str, BytesDomain]) -> dict[tuple[str, str, float, str], Any]:
    """Return the rows by (domain, what was done, share, data type); each is measured or found on disk."""
    store = Rows(args, "bytes", seed=args.seed)
    found: dict[tuple[str, str, float, str], Any] = {}
    for name, domain in domains.items():
        for share in (0.0, *(args.shares if name == args.compared else (args.other_share,))):
            wanted = [
                (form, dtype) for form in ((BASE,) if not share else (DEFAULT, HEALED)) for dtype in args.dtypes[form]
            ]
            keys = {one: key_of(args, name, one[0], share, one[1]) for one in wanted}
            if all(store.find(key) for key in keys.values()):
                found |= {(name, form, share, dtype): store.find(keys[form, dtype]) for form, dtype in wanted}
                continue
            for form, loaded in domain.models(share):
                for dtype in args.dtypes[form]:
                    base = found.get((name, BASE, 0.0, args.dtypes[BASE][0]))

                    def measured(
                        loaded: LoadedModel = loaded, dtype: str = dtype, base: Any = base, domain: BytesDomain = domain
                    ) -> dict[str, Any]:
                        begin = time.perf_counter()
                        row = domain.measure_file(loaded, dtype, base)
                        return row | {"seconds": round(time.perf_counter() - begin, 1)}

                    found[name, form, share, dtype] = store.get_or_measure(keys[form, dtype], measured)
    return found


def key_of(args: argparse.Namespace, name: str, form: str, share: float, dtype: str) -> dict[str, Any]:
    """Return the key of a row: all that decides it."""
    key = {"domain": name, "form": form, "share": share, "dtype": dtype, "eval_tokens": args.eval_tokens}
    if share:
        key |= {"blocks": args.num_samples, "length": args.length, "seed": args.seed}
    return key | ({"minutes": args.minutes} if form == HEALED else {})


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
    options.add_argument("--eval-tokens", type=int, default=12_000, help="at most this many test tokens per text")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of llama.cpp")
    if "--quick" in arguments:
        options.set_defaults(domains=["medicine"], shares=[0.3], minutes=1.0, num_samples=16, eval_tokens=4_000)
    args = parse_compared(options, arguments)
    args.general_tokens = args.eval_tokens
    args.dtypes = dict.fromkeys(DTYPES, QUICK) if args.quick else DTYPES
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    load: Callable[[], Any] = cache(smollm2)
    found = measure(args, {name: BytesDomain(load, args, name, targets=("mlp",)) for name in args.domains})
    section = "bytes_quick" if args.quick else "bytes"
    picture = plot_path(section)
    draw(found, args, picture)
    write_section(section, results_text(found, args, picture))


if __name__ == "__main__":
    main()
