"""What a server is told: sizes, keys, and the refusal to be open to everyone."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

from flagscale.errors import ConfigError, UserError
from flagscale.inference.server.__main__ import parse_options
from flagscale.inference.server.options import ServerOptions, is_loopback, load_keys, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000", 1000),
        ("2K", 2048),
        ("2KiB", 2048),
        ("512M", 2**29),
        ("1.5GiB", 3 * 2**29),
        ("2gb", 2**31),
        ("1T", 2**40),
    ],
)
def test_numbers_of_bytes_have_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "many", "-1", "1X", "1 GiB more", "GiB"])
def test_what_is_no_number_of_bytes_says_so(text: str) -> None:
    with pytest.raises(UserError, match="not a number of bytes; expected one as `2GiB`"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("host", "is_it"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
        ("10.0.0.1", False), ("::", False), ("example.com", False), ("localhost.example.com", False),
    ],
)  # fmt: skip
def test_only_what_this_machine_alone_reaches_needs_no_key(host: str, is_it: bool) -> None:
    assert is_loopback(host) is is_it
    if not is_it:
        with pytest.raises(UserError, match=f"--host {host}: a server that other machines reach needs a key"):
            ServerOptions(model=Path("m"), names=("m",), host=host)
    ServerOptions(model=Path("m"), names=("m",), host=host, keys=("k",))


def test_keys_come_from_a_variable_and_from_lines_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", " a ")
    file = tmp_path / "keys"
    file.write_text("b\n\n c \n")
    assert load_keys("ONE", file) == ("a", "b", "c")
    assert load_keys(None, None) == ()
    monkeypatch.setenv("ONE", " ")
    with pytest.raises(UserError, match="--api-key-env ONE: the environment has no such variable, or it is empty"):
        load_keys("ONE", None)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no key"):
        load_keys(None, file)
    with pytest.raises(UserError, match="cannot be read"):
        load_keys(None, tmp_path / "nowhere")


def test_options_are_read_and_the_folders_name_is_the_models() -> None:
    options = parse_options(["--model", "some/where/tiny/", "--kv-cache-bytes", "1GiB", "--max-model-len", "99"])
    assert (options.names, options.host, options.port) == (("tiny",), "127.0.0.1", 8000)
    assert (options.engine.kv_cache_bytes, options.engine.max_model_len) == (2**30, 99)
    options = parse_options(["--model", "m", "--served-model-name", "a", "b", "--no-prefix-caching", "--seed", "4"])
    assert (options.names, options.engine.prefix_caching, options.engine.seed) == (("a", "b"), False, 4)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.page_size: 0 is too small"):
        parse_options(["--model", "m", "--page-size", "0"])
