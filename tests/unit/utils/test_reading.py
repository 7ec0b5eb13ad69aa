"""Small files of others: plain JSON and YAML within bounds, or an error in words."""

import json
import os

import pytest

from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.utils.files import expand_home
from hf_context_prune.utils.options import read_options
from hf_context_prune.utils.reading import read_bounded, read_json, read_yaml
from tests.support.limits import within

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = [
    ("[" * 5_000, "nested over 32 deep"),
    ("- " * 100_000, "nested over 32 deep"),
    ("{" * 9_000, "nested over 32 deep"),
    (BOMB, "over 10,000 values"),
    ("- &a0 [x]\n" + "".join(f"- &a{n} [*a{n - 1}]\n" for n in range(1, 9_999)), "over 10,000 values"),
    ("a: &a [*a]", r"the alias \*a stands for nothing before it"),
    ("a: *b", r"the alias \*b stands for nothing before it"),
    ("x: [" + "1," * 100_000, "over 10,000 values"),
    ("a: " + "9" * 5_000, "beyond 64 bits"),
    ("a: 0x" + "f" * 5_000, "beyond 64 bits"),
    ("a: 9223372036854775808", "beyond 64 bits"),
    ("a: " + "1:" * 60_000 + "1", "beyond 64 bits"),
    ("a: !!python/object/apply:os.system [exit]", "the tag .* is not read"),
    ("a: !!int x", "the tag .* is not read"),
    ("a: !x y", "the tag !x is not read"),
    ("a: 1\nb: 2\na: 3", "there twice"),
    ("a: 2024-13-45", "month must be in"),
    ('a: "\\ud800"', "half a character"),
    ("? [a]\n: b", "unhashable"),
    ("a: [", "expected the node content"),
    ("a: 1\n---\na: 2", "single document"),
]
BAD_JSON = [
    (b"[" * 5_000, "nested too deeply"),
    (b"[" * 600_000, "too many parts"),
    (b"[" + b"{}," * 600_000 + b"{}]", "too many parts"),
    (b"1," * 7_100_000, "too many parts"),
    (b" " * (16 * 2**20 + 1), "over 16,777,216 bytes"),
    (b'{"a": 1, "a": 2}', "'a' is there twice"),
    (b"{" + b"".join(b'"%d": 1,' % n for n in range(400_000)) + b'"399999": 2}', "'399999' is there twice"),
    (b'{"a": NaN}', "holds NaN"),
    (b"[-Infinity]", "holds -Infinity"),
    (b"[" + b"9" * 5_000 + b"]", "4300 digits"),
    (b'["\\uD800"]', "half a character"),
    (b'{"\\udfff": 1}', "half a character"),
    (b"\xff\xfe{}", r"not UTF-8 text \(byte 0\)"),
    (b"", "Expecting value"),
    (b"{}{}", "Extra data"),
]


def test_hostile_yaml(tmp_path, subtests):
    path = tmp_path / "a.yaml"
    for text, said in BAD_YAML:
        path.write_text(text)
        with subtests.test(text[:30]), within(seconds=2), pytest.raises(ValueError, match=said):
            read_yaml(path)


def test_an_error_of_yaml_is_one_sentence(tmp_path, subtests):
    path = tmp_path / "a.yaml"
    for text, said in (
        ("x: 1\na: [", "expected the node content, but found '<stream end>' (line 2, column 5)"),
        ("a: 2024-13-45", "2024-13-45 is no date: month must be in 1..12 (line 1, column 4)"),
        ("a: 1\n---\na: 2", "expected a single document in the stream, but found another document (line 2, column 1)"),
        ("? [a]\n: b", "found unhashable key (line 1, column 3)"),
        ("a: \0", "unacceptable character #x0000: special characters are not allowed in"),
    ):
        path.write_text(text)
        with subtests.test(text), pytest.raises(ConfigError) as raised:
            read_options(path)
        assert str(raised.value).startswith(f"The config file {path} can't be read: {said}")
        assert "\n" not in str(raised.value)


def test_hostile_json(tmp_path, subtests):
    path = tmp_path / "a.json"
    for content, said in BAD_JSON:
        path.write_bytes(content)
        with subtests.test(content[:30]), within(seconds=2), pytest.raises(ValueError, match=said):
            read_json(path)


def test_plain_values(tmp_path):
    path = tmp_path / "a"
    path.write_text("\ufeffa: 1\nb: [1.5, .inf, 0x1f, -7, true, ~, 'x', 1_000, 9223372036854775807]\n<<: {c: é}\n")
    assert read_yaml(path) == {"a": 1, "b": [1.5, float("inf"), 31, -7, True, None, "x", 1000, 2**63 - 1], "c": "é"}
    path.write_text("base: &base {path: x}\nmodels: [{base: *base}, {base: *base}]\n")
    assert read_yaml(path) == {"base": {"path": "x"}, "models": [{"base": {"path": "x"}}] * 2}
    value = {"a": [1, -2.5e-3, None, True, "é\U0001f600"], "b": {"a": {}}}
    path.write_text(json.dumps(value))
    assert read_json(path) == value


def test_what_is_no_regular_file(tmp_path, subtests):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    kinds = {"pipe": "a named pipe", "link": "a named pipe", ".": "a folder", "/dev/zero": "a device"}
    for name, said in kinds.items():
        for read in (read_json, read_yaml, lambda path: read_bounded(path, 10)):
            with subtests.test(name, read=read), within(seconds=2), pytest.raises(OSError, match=said):
                read(tmp_path / name)


def test_a_sparse_file_is_not_read_whole(tmp_path):
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, 10**11)
    for read in (read_json, read_yaml):
        with within(seconds=2), pytest.raises(ValueError, match="it has over"):
            read(path)


def test_paths_of_users(tmp_path, monkeypatch, subtests):
    monkeypatch.chdir(tmp_path)
    assert expand_home("~/a") == tmp_path.home() / "a"
    for good in ("a", "a\nb", "..", "...", "\U0001f600", "b" * 255, "a/~b"):
        assert str(expand_home(good)) == good
    (tmp_path / "loop").symlink_to("loop")
    bad = {
        "": "empty name",
        " \n": "empty name",
        "~nobody-here/x": "begins with ~nobody-here, but",
        "a" * 256: r"256 characters\) can't be looked up: File name too long",
        "a/" * 2_100: "File name too long",
        "a\0b": "null",
        "\ud800": "not UTF-8",
        "loop": "symbolic links",
    }
    for path, said in bad.items():
        for error in (ConfigError, DataError):
            with subtests.test(repr(path[:20])), pytest.raises(error, match=said) as caught:
                expand_home(path, error)
            assert len(str(caught.value)) < 400
