"""Every row of a mixed batch equals its own single-row, unpadded run."""

from __future__ import annotations

import random

import pytest
import torch
import zoo

import fastprompt as fp

LENGTHS = (1, 5, 12, 33, 64, 200)


def prompted(backbone, seed: int = 0) -> fp.PromptedModel:
    """The backbone with prompts of several methods and lengths, with weights large enough to matter."""
    model = fp.PromptedModel(backbone)
    rng = random.Random(seed)
    whole = model._info.path == "attention"
    configs: dict[str, fp.PromptConfig] = {}
    for i, length in enumerate(rng.sample(LENGTHS, 4)):
        configs[f"prefix{i}"] = fp.PrefixTuning(num_virtual_tokens=length)
    configs["embed"] = fp.PromptTuning(num_virtual_tokens=rng.choice(LENGTHS[:4]))
    configs["ptuning"] = fp.PTuning(num_virtual_tokens=6, encoder="mlp", encoder_hidden_size=16)
    if whole:
        configs["v2"] = fp.PTuningV2(num_virtual_tokens=9, layers=(-1, 0))
    for name, config in configs.items():
        prompt = model.add_prompt(name, config, seed=seed)
        with torch.no_grad():
            for p in prompt.encoder.parameters():
                p.normal_(0.0, 0.5)
    return model.eval()


def batch(rows: int, longest: int, side: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids `[B, N]` with their mask; every row has at least one real token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, zoo.VOCAB, (rows, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    column = torch.arange(longest)
    mask = column < lengths[:, None] if side == "right" else column >= longest - lengths[:, None]
    return torch.where(mask, ids, 0), mask.long()


def some_rows(model: fp.PromptedModel, count: int, seed: int) -> list[str | None]:
    rng = random.Random(seed)
    names = [*model.prompt_names, None]
    return [*names, *rng.choices(names, k=count)][-count:] if count >= len(names) else rng.sample(names, count)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(actual).all()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


COUNTS_PADDING = "gpt_neo"  # its local window does: padding between prompt and text is refused


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_forward(name: str, side: str) -> None:
    model = prompted(zoo.causal(name), seed=len(name))
    ids, mask = batch(11, 21, side, seed=3)
    rows = some_rows(model, 11, seed=5)
    if name == COUNTS_PADDING and side == "left":
        with pytest.raises(fp.FastPromptError, match="local window"):
            model(input_ids=ids, attention_mask=mask, prompts=rows)
        return
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, prompts=rows).logits
        for b, row in enumerate(rows):
            real = mask[b].bool()
            alone = model(input_ids=ids[b : b + 1, real], prompts=[row]).logits[0]
            assert_close(mixed[b, real], alone)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_generate(name: str, side: str) -> None:
    model = prompted(zoo.causal(name), seed=len(name))
    ids, mask = batch(7, 13, side, seed=8)
    rows = some_rows(model, 7, seed=9)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    if name == COUNTS_PADDING:
        mask = torch.ones_like(mask)
    mixed = model.generate(input_ids=ids, attention_mask=mask, prompts=rows, **options)
    for b, row in enumerate(rows):
        text = ids[b : b + 1, mask[b].bool()]
        alone = model.generate(input_ids=text, attention_mask=torch.ones_like(text), prompts=[row], **options)
        assert mixed[b, -12:].tolist() == alone[0, -12:].tolist(), f"row {b} with {row}"


@pytest.mark.parametrize("name", zoo.SEQ2SEQ)
def test_encoder_decoder(name: str) -> None:
    model = prompted(zoo.seq2seq(name), seed=len(name))
    ids, mask = batch(9, 12, "right", seed=3)
    target, target_mask = batch(9, 7, "right", seed=4)
    rows = some_rows(model, 9, seed=5)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, num_beams=1)
    with torch.no_grad():
        inputs = dict(input_ids=ids, attention_mask=mask, decoder_input_ids=target)
        mixed = model(**inputs, decoder_attention_mask=target_mask, prompts=rows).logits
        generated = model.generate(input_ids=ids, attention_mask=mask, prompts=rows, **options)
        for b, row in enumerate(rows):
            real, wanted = mask[b].bool(), target_mask[b].bool()
            text = ids[b : b + 1, real]
            alone = model(input_ids=text, decoder_input_ids=target[b : b + 1, wanted], prompts=[row]).logits[0]
            assert_close(mixed[b, wanted], alone)
            one = model.generate(input_ids=text, attention_mask=torch.ones_like(text), prompts=[row], **options)
            assert generated[b].tolist() == one[0].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", zoo.HEADS)
@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_encoder(name: str, head: str, side: str) -> None:
    backbone = zoo.encoder(name, head)
    model = fp.PromptedModel(backbone)
    configs: dict[str, fp.PromptConfig] = {
        "embed": fp.PromptTuning(num_virtual_tokens=5),
        "longer": fp.PromptTuning(num_virtual_tokens=19),
    }
    if model._info.path == "attention":
        configs |= {
            "prefix": fp.PrefixTuning(num_virtual_tokens=11),
            "v2": fp.PTuningV2(num_virtual_tokens=3, layers=(1,)),
        }
    for prompt_name, config in configs.items():
        labels = 2 if head == "qa" else 2 + len(prompt_name) % 3
        prompt = model.add_prompt(prompt_name, config, num_labels=labels, seed=1)
        with torch.no_grad():
            for p in prompt.parameters():
                p.normal_(0.0, 0.5)
    model.eval()
    ids, mask = batch(8, 14, side, seed=2)
    ids = torch.where(mask.bool(), ids, backbone.config.pad_token_id)
    rows = some_rows(model, 8, seed=6)
    per_token = head != "seq_cls"
    with torch.no_grad():
        mixed = model(input_ids=ids, attention_mask=mask, prompts=rows)
        for b, row in enumerate(rows):
            real = mask[b].bool()
            alone = model(input_ids=ids[b : b + 1, real], prompts=[row])
            for field in ("logits", "start_logits", "end_logits"):
                if (expected := alone.get(field)) is not None:
                    actual = mixed[field][b][real] if per_token else mixed[field][b]
                    width = expected.shape[-1] if field == "logits" else None
                    assert_close(actual[..., :width] if width else actual, expected[0])
