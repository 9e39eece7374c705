"""Text goes out in whole characters, up to the first stop string, and is what decoding all at once gives."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fastprompt import demo
from fastprompt.serving.request import TokenLogprob, Tokens
from fastprompt.serving.text import Pieces


class Bytes:
    """One token a byte: characters need several."""

    def decode(self, tokens, skip_special_tokens=True):
        assert skip_special_tokens
        return bytes(tokens).decode(errors="replace")


def _feed(pieces, tokens, reason="length", step=1):
    deltas = []
    for i in range(0, len(tokens), step):
        last = i + step >= len(tokens)
        delta = pieces.add(Tokens("r", 3, tuple(tokens[i : i + step]), finish_reason=reason if last else None))
        if delta is not None:
            deltas.append(delta)
        if pieces.stopped:
            break
    return deltas


def test_characters_stay_whole():
    text = "grüße 🙂 à la carte"
    deltas = _feed(Pieces(Bytes(), 3, ()), list(text.encode()))
    assert "".join(d.text for d in deltas) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in d.text for d in deltas)
    assert sum(len(d.tokens) for d in deltas) == len(text.encode())
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert {d.index for d in deltas} == {3}


def test_a_text_that_ends_inside_a_character_says_so():
    deltas = _feed(Pieces(Bytes(), 0, ()), list("ü".encode()[:1]))
    assert deltas[-1].text == "\N{REPLACEMENT CHARACTER}" and deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("step", [1, 2, 5])
def test_stop_strings_end_the_text_before_them(step):
    pieces = Pieces(Bytes(), 0, ("END", "\n\n"))
    deltas = _feed(pieces, list(b"one EN\ntwo\n\nthree END"), step=step)
    assert "".join(d.text for d in deltas) == "one EN\ntwo"
    assert pieces.stopped and deltas[-1].finish_reason == "stop" and deltas[-1].stop_reason == "\n\n"


def test_the_first_of_several_stop_strings_counts():
    pieces = Pieces(Bytes(), 0, ("cd", "bcde"))
    deltas = _feed(pieces, list(b"abcdef"), step=6)
    assert deltas[-1].text == "a" and deltas[-1].stop_reason == "bcde"


def test_no_stop_string_counts_before_min_tokens():
    pieces = Pieces(Bytes(), 0, ("b",), min_tokens=4)
    deltas = _feed(pieces, list(b"abcdbe"))
    assert "".join(d.text for d in deltas) == "abcd" and deltas[-1].stop_reason == "b"


def test_what_was_held_back_comes_at_the_end():
    deltas = _feed(Pieces(Bytes(), 0, ("END",)), list(b"one EN"))
    assert "".join(d.text for d in deltas) == "one EN"


def test_tokens_and_logprobs_come_with_the_text_they_made():
    pieces = Pieces(Bytes(), 0, ())
    a, b = "ü".encode()
    assert pieces.add(Tokens("r", 0, (a,), (TokenLogprob(a, -1.0),))) is None
    delta = pieces.add(Tokens("r", 0, (b,), (TokenLogprob(b, -2.0),)))
    assert delta.tokens == (a, b) and [p.logprob for p in delta.logprobs] == [-1.0, -2.0]


def test_an_end_token_is_named_and_a_cancelled_row_is_answered():
    assert Pieces(Bytes(), 0, ()).add(Tokens("r", 0, (), finish_reason="stop", stop_token=9)).stop_reason == 9
    assert Pieces(Bytes(), 0, ()).add(Tokens("r", 0, (), finish_reason="abort")).finish_reason == "abort"


def _sentencepiece():
    """Words that carry their spaces, bytes for what is no word, and special tokens, as Llama 2's tokenizer has them."""
    words = ["\u2581a", "\u2581b", "a", "b", "\u2581", "."]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    made = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], byte_fallback=True))
    parts = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence(list(parts))
    made.add_special_tokens([AddedToken(n, special=True) for n in names[1:3]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    characters = [[3 + byte for byte in c.encode()] for c in "é🙂x "]
    return tokenizer, [[1], [2], *([len(names) - 1 - i] for i in range(len(words))), *characters]


@pytest.mark.parametrize("seed", range(20))
def test_spaces_stay_beside_special_tokens(seed):
    (tokenizer, kinds), rng = _sentencepiece(), random.Random(seed)
    tokens = [token for _ in range(60) for token in rng.choice(kinds)]
    deltas = _feed(Pieces(tokenizer, 0, ()), tokens, step=rng.choice([1, 1, 3]))
    assert "".join(d.text for d in deltas) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_bytes_without_end_are_not_decoded_again_and_again(step):
    class Counting(Bytes):
        decoded = 0

        def decode(self, tokens, skip_special_tokens=True):
            self.decoded += len(tokens)
            return super().decode(tokens, skip_special_tokens)

    counting, noise = Counting(), [0xFF] * 2000
    deltas = _feed(Pieces(counting, 0, ()), noise + list(b"and text" * 9), step=step)
    assert "".join(d.text for d in deltas) == "\N{REPLACEMENT CHARACTER}" * 2000 + "and text" * 9
    assert deltas[0].finish_reason is None  # text goes on once there is some
    assert counting.decoded < 2000**2 / 16


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_the_whole_text_of_a_real_tokenizer(seed):
    tokenizer, rng = demo.tokenizer(), random.Random(seed)
    tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
    deltas = _feed(Pieces(tokenizer, 0, ()), tokens, step=rng.choice([1, 3]))
    assert "".join(d.text for d in deltas) == tokenizer.decode(tokens, skip_special_tokens=True)
