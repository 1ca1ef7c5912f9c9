"""Tokens in log-probabilities, and a tokenizer and a model that are made out of nothing."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flagscale.errors import UserError  # noqa: E402
from flagscale.inference.byte_tokenizer import byte_alphabet, write_byte_tokenizer  # noqa: E402
from flagscale.inference.recipe import make_tiny_model  # noqa: E402
from flagscale.inference.server.service import find_defaults  # noqa: E402
from flagscale.inference.server.token_text import TokenTable  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder, 100)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_tokens_of_a_text_are_its_bytes(tokenizer: Any) -> None:
    text = "".join(map(chr, range(1, 0x180))) + "€😀\r\n"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.decode([65, 256, 66], skip_special_tokens=True) == "AB"
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.model_max_length) == (257, 256, 100)
    assert len(set(byte_alphabet())) == 256


def test_the_chat_template_is_plain_text(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "user: a\nassistant: b\nassistant:"


def test_a_token_has_exact_bytes_and_a_text_that_is_its_own(tokenizer: Any) -> None:
    table = TokenTable(tokenizer)
    texts = [table.find(token) for token in range(257)]
    assert [text.data for text in texts[:256]] == [bytes([byte]) for byte in range(256)]
    assert len({text.text for text in texts}) == 257
    assert (texts[65].text, texts[65].num_characters) == ("A", 1)
    assert (texts[0xC3].text, texts[0xC3].num_characters) == ("bytes:\\xc3", 1)
    assert (texts[0xA9].text, texts[0xA9].num_characters) == ("bytes:\\xa9", 0)
    assert (texts[256].text, texts[256].num_characters) == ("<|end|>", 0)


class Pieces:
    """A tokenizer in the manner of SentencePiece."""

    all_special_ids = (0,)
    pieces = ("<s>", "▁hello", "<0xE2>", "a▁b", "é")

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.pieces[token] if token < len(self.pieces) else None

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(self.pieces[token] if token < len(self.pieces) else "" for token in tokens)


def test_pieces_with_spaces_and_single_bytes_are_exact_too() -> None:
    table = TokenTable(Pieces())
    assert [table.find(token).data for token in range(6)] == [
        b"<s>", b" hello", b"\xe2", b"a b", "é".encode(), b""
    ]  # fmt: skip
    assert table.find(1).num_characters == 6
    assert TokenTable(None).find(17).text == "17"


def test_a_tiny_model_is_made_the_same_each_time_and_learns(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        one, other = (make_tiny_model(tmp_path / name, steps=4) for name in "ab")
        random = make_tiny_model(tmp_path / "c", steps=0)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    tokens = torch.tensor([list(b"Tale 3: once there was a ")])
    losses = []
    for folder in (one, random):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses.append(float(model(tokens, labels=tokens).loss))
    assert losses[0] < losses[1] - 0.5
    assert transformers.AutoTokenizer.from_pretrained(one).eos_token_id == model.config.eos_token_id == 256
    with pytest.raises(UserError, match="is not empty; expected a folder that does not exist yet"):
        make_tiny_model(one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_model_recommends_settings_and_requests_overrule_them() -> None:
    from engine_models import make_model

    model = make_model()
    assert find_defaults(model) == {}
    model.generation_config.update(temperature=0.6, top_k=20, top_p=0.95, do_sample=True, max_new_tokens=3)
    assert find_defaults(model) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
