"""Inits that read a backbone, against a small backbone made for the purpose."""

from __future__ import annotations

import pytest
import torch

from fastprompt.errors import ArgumentError
from fastprompt.prompts import Cartridge, InitSource, PrefixTuning, PromptTuning, PTuningV2
from fastprompt.spec import BackboneSpec, LayerShape, Prefix, flatten

SPEC = BackboneSpec("fake", 6, 40, (LayerShape(2, 3, 4), LayerShape(1, 5, 2)), causal=True)


class FakeSource:
    """Row i of the table is the embedding of token i; words are tokens, spelt "7", and "+" joins sub-pieces."""

    vocab_size = 40

    def __init__(self) -> None:
        self.table = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        self.asked: list[list[int]] = []

    def tokenize(self, text: str) -> list[int]:
        return [int(piece) for piece in text.replace("+", " ").split() if piece.isdigit()]

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        assert ids.dtype == torch.long and ids.dim() == 1
        self.asked.append(ids.tolist())
        return self.table[ids].to(torch.bfloat16)

    def activations(self, ids: torch.Tensor) -> Prefix:
        self.asked.append(ids.tolist())
        shapes = [(s.kv_heads, d) for s in SPEC.layers for d in (s.key_dim, s.value_dim)]
        made = [ids.float().view(1, -1, 1).expand(h, -1, d) + 100 * n for n, (h, d) in enumerate(shapes)]
        return Prefix((0, 1), tuple(made[::2]), tuple(made[1::2])).map(lambda t: t.to(torch.float64))


@pytest.fixture
def source() -> FakeSource:
    fake = FakeSource()
    assert isinstance(fake, InitSource)
    return fake


def row(source: FakeSource, token: int) -> torch.Tensor:
    return source.table[token].detach().to(torch.bfloat16).float()


def test_random_is_uniform_between_minus_and_plus_a_half():
    weights = PromptTuning(num_virtual_tokens=500).build(SPEC, seed=0).weights()
    assert weights.min() >= -0.5 and weights.max() < 0.5
    # 3000 draws of variance 1/12: five standard errors of the mean are 0.026
    assert abs(weights.mean().item()) < 0.026 and weights.max() > 0.45 and weights.min() < -0.45


@pytest.mark.parametrize(("count", "top"), [(5, 5000), (5, 7), (9, 4), (40, 40)])
def test_vocab_samples_the_most_frequent_tokens(source, count, top):
    prompt = PromptTuning(num_virtual_tokens=count, init="vocab", vocab_top=top).build(SPEC, source, seed=1)
    (ids,) = source.asked
    pool = min(top, 40)
    assert len(ids) == count and set(ids) <= set(range(pool))
    if count <= pool:
        assert len(set(ids)) == count  # no repeats while they last
    assert torch.equal(prompt(), torch.stack([row(source, i) for i in ids]))
    assert prompt().dtype == torch.float32 and prompt().requires_grad


@pytest.mark.parametrize(("count", "ids"), [(3, [4, 8, 15]), (2, [4, 8]), (7, [4, 8, 15, 4, 8, 15, 4])])
def test_text_is_repeated_or_cut(source, count, ids):
    prompt = PromptTuning(num_virtual_tokens=count, init="text", init_text="4 8 15").build(SPEC, source)
    assert torch.equal(prompt(), torch.stack([row(source, i) for i in ids]))


def test_labels_average_their_pieces_and_the_rest_is_sampled(source):
    config = PromptTuning(num_virtual_tokens=5, init="labels", init_labels=["3+9+20", "7"], vocab_top=6)
    prompt = config.build(SPEC, source, seed=0)
    weights = prompt().detach()
    expected = torch.stack([row(source, i) for i in (3, 9, 20)]).mean(0)
    assert torch.allclose(weights[0], expected, atol=1e-7) and torch.equal(weights[1], row(source, 7))
    assert len(source.asked[-1]) == 3 and set(source.asked[-1]) <= set(range(6))
    assert torch.equal(weights[2:], torch.stack([row(source, i) for i in source.asked[-1]]))
    assert config.init_labels == ("3+9+20", "7")


def test_labels_may_fill_the_whole_prompt(source):
    config = PromptTuning(num_virtual_tokens=2, init="labels", init_labels=("7", "8"))
    assert torch.equal(config.build(SPEC, source)(), torch.stack([row(source, 7), row(source, 8)]))


@pytest.mark.parametrize("method", [PrefixTuning, PTuningV2, Cartridge])
@pytest.mark.parametrize(("count", "ids"), [(2, [4, 8]), (5, [4, 8, 15, 4, 8])])
def test_activations_are_the_backbones_keys_and_values(source, method, count, ids):
    prompt = method(num_virtual_tokens=count, init="activations", init_text="4 8 15").build(SPEC, source)
    assert source.asked == [ids]
    expected = source.activations(torch.tensor(ids)).map(lambda t: t.float())
    got = prompt()
    assert torch.equal(flatten(got), flatten(expected)) and got.keys[0].dtype == torch.float32
    assert all(p.requires_grad and p.is_leaf for p in prompt.parameters())


def test_chosen_layers_start_from_their_own_activations(source):
    config = PTuningV2(num_virtual_tokens=2, layers=(-1,), init="activations", init_text="4 8")
    last = source.activations(torch.tensor([4, 8])).only((SPEC.num_layers - 1,)).map(lambda t: t.float())
    assert torch.equal(flatten(config.build(SPEC, source)()), flatten(last))


def test_sampled_inits_repeat_with_a_seed(source):
    config = PromptTuning(num_virtual_tokens=4, init="vocab")
    assert torch.equal(config.build(SPEC, source, seed=2)(), config.build(SPEC, source, seed=2)())
    assert not torch.equal(config.build(SPEC, source, seed=2)(), config.build(SPEC, source, seed=3)())


@pytest.mark.parametrize(
    "config",
    [
        PromptTuning(num_virtual_tokens=2, init="vocab"),
        PromptTuning(num_virtual_tokens=2, init="text", init_text="1"),
        PromptTuning(num_virtual_tokens=2, init="labels", init_labels=("1",)),
        PrefixTuning(num_virtual_tokens=2, init="activations", init_text="1"),
        Cartridge(num_virtual_tokens=2, init="activations", init_text="1"),
    ],
    ids=str,
)
def test_an_init_without_its_source_says_what_to_pass(config):
    with pytest.raises(ArgumentError, match=f'init="{config.init}".*pass an InitSource to build'):
        config.build(SPEC)


def test_texts_without_tokens_are_refused(source):
    with pytest.raises(ArgumentError, match="has no tokens"):
        PromptTuning(num_virtual_tokens=2, init="text", init_text="word").build(SPEC, source)
    with pytest.raises(ArgumentError, match="has no tokens"):
        PromptTuning(num_virtual_tokens=2, init="labels", init_labels=("1", "word")).build(SPEC, source)


def test_a_source_of_another_backbone_is_refused(source):
    wide = BackboneSpec("wide", 8, 40, SPEC.layers, causal=True)
    with pytest.raises(ArgumentError, match=r"gave shape \[2, 6\], expected \[2, 8\]"):
        PromptTuning(num_virtual_tokens=2, init="vocab").build(wide, source)
    deep = BackboneSpec("deep", 6, 40, SPEC.layers * 2, causal=True)
    with pytest.raises(ArgumentError, match=r"layers \[0, 1\], expected 2 tokens for layers \[0, 1, 2, 3\]"):
        PrefixTuning(num_virtual_tokens=2, init="activations", init_text="1").build(deep, source)
