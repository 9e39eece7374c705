"""Inits that read the backbone, checked by what the prompt then does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import fastprompt as fp

TEXT = "5 6 7 8 9 11 13"
TOKENS = torch.tensor([[int(t) for t in TEXT.split()]])
IDS = torch.randint(3, zoo.VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))


def words(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer whose words are token ids."""
    return {"input_ids": [int(t) for t in text.split()]}


def logits_behind_the_text(backbone: Any) -> torch.Tensor:
    with torch.no_grad():
        return backbone(input_ids=torch.cat([TOKENS, IDS], dim=1)).logits[:, TOKENS.shape[1] :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral_window", "bloom", "gptj"])
@pytest.mark.parametrize(
    "config",
    [
        fp.PrefixTuning(num_virtual_tokens=7, init="activations", init_text=TEXT),
        fp.Cartridge(num_virtual_tokens=7, init="activations", init_text=TEXT),
        fp.PromptTuning(num_virtual_tokens=7, init="text", init_text=TEXT),
    ],
    ids=lambda c: c.method,
)
def test_a_prompt_made_from_a_text_acts_as_the_text(name: str, config: fp.PromptConfig) -> None:
    backbone = zoo.causal(name)
    expected = logits_behind_the_text(backbone)
    model = fp.PromptedModel(backbone, tokenizer=words)
    model.add_prompt("it", config)
    with torch.no_grad():
        got = model.eval()(input_ids=IDS, prompts="it").logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_class_labels_and_vocabulary() -> None:
    backbone = zoo.causal("llama")
    model = fp.PromptedModel(backbone, tokenizer=words)
    table = backbone.get_input_embeddings().weight
    labels = model.add_prompt(
        "l", fp.PromptTuning(num_virtual_tokens=4, init="labels", init_labels=("5", "6 7")), seed=0
    )
    torch.testing.assert_close(labels()[:2], torch.stack([table[5], (table[6] + table[7]) / 2]))
    sampled = model.add_prompt("v", fp.PromptTuning(num_virtual_tokens=5, init="vocab"), seed=0)
    distance = (sampled()[:, None] - table).abs().amax(-1).amin(1)
    assert distance.max() == 0  # every row is some token's embedding
