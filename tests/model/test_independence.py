"""What a row gives must not depend on neighbours, on the bank, on where the model was, or on what ran meanwhile."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AttentionInterface, GenerationConfig, Trainer, TrainingArguments

import fastprompt as fp
from fastprompt.integrations import transformers
from fastprompt.integrations.transformers import attention

GREEDY: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)


def prompted(backbone: Any, **prompts: fp.PromptConfig) -> fp.PromptedModel:
    model = fp.PromptedModel(backbone).eval()
    for i, (name, config) in enumerate(prompts.items()):
        with torch.no_grad():
            for p in model.add_prompt(name, config, seed=i).encoder.parameters():
                p.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(i))
    return model


PREFIX = fp.PrefixTuning(num_virtual_tokens=9)


def test_rows_without_prompts_are_the_same_with_and_without_prompted_neighbours() -> None:
    model = prompted(zoo.causal("gpt2"), p=PREFIX)
    ids = torch.randint(3, zoo.VOCAB, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        alone = model(input_ids=ids * mask, attention_mask=mask, prompts=[None, None]).logits[0, 3:]
        beside = model(input_ids=ids * mask, attention_mask=mask, prompts=[None, "p"]).logits[0, 3:]
        unpadded = model(input_ids=ids[:1, 3:]).logits[0]
    torch.testing.assert_close(alone, unpadded, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beside, unpadded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_infers_the_mask_from_padding(name: str) -> None:
    model = prompted(zoo.causal(name), p=PREFIX)
    ids = torch.randint(3, zoo.VOCAB, (2, 8))
    ids[0, :3] = 0
    given = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), prompts="p", **GREEDY)
    assert model.generate(input_ids=ids, prompts="p", **GREEDY).tolist() == given.tolist()
    model.backbone.generation_config.pad_token_id = None
    config = GenerationConfig(**GREEDY)
    assert model.generate(input_ids=ids, prompts="p", generation_config=config).tolist() == given.tolist()


def test_right_padded_embeddings_are_moved_left() -> None:
    model = prompted(zoo.causal("llama"), p=PREFIX)
    ids = torch.randint(3, zoo.VOCAB, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    table = model.backbone.get_input_embeddings()
    both = model.generate(inputs_embeds=table(ids), attention_mask=mask, prompts="p", **GREEDY)
    alone = model.generate(inputs_embeds=table(ids[:1, :5]), prompts="p", **GREEDY)
    assert both[0].tolist()[: alone.shape[1]] == alone[0].tolist()


def test_a_graph_outlives_what_happens_to_the_bank() -> None:
    backbone = zoo.causal("llama")
    model = fp.PromptedModel(backbone, bank_bytes=384 * 10).eval()  # room for one of the prompts
    for i, name in enumerate(("a", "b")):
        model.add_prompt(name, PREFIX, seed=i).requires_grad_(False)
    ids = torch.randint(3, zoo.VOCAB, (1, 6))

    def gradient(disturb: bool) -> torch.Tensor:
        embeds = backbone.get_input_embeddings()(ids).requires_grad_()
        loss = model(inputs_embeds=embeds, prompts="a").logits.square().mean()
        if disturb:
            with torch.no_grad():
                model(input_ids=ids, prompts="b")
        loss.backward()
        return embeds.grad

    torch.testing.assert_close(gradient(disturb=True), gradient(disturb=False))


def test_a_moved_model_moves_its_prefixes() -> None:
    model = prompted(zoo.causal("llama"), p=PREFIX)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]), prompts="p")
    model.to("meta")
    assert {d.type for d in model._info.layer_devices} == {"meta"}
    assert model.library.bank.keys(0).device.type == "meta"
    assert all(p.device.type == "meta" for p in model.parameters())


def test_a_new_prompt_follows_the_models_mode() -> None:
    model = fp.PromptedModel(zoo.causal("llama")).eval()
    prompt = model.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=9, dropout=0.5))
    assert not prompt.training
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids, prompts="p").logits, model(input_ids=ids, prompts="p").logits)


def test_wrapping_and_compiling_leave_every_modules_mode_alone() -> None:
    backbone = zoo.causal("llama").train()
    backbone.model.layers[0].eval()
    modes = {n: m.training for n, m in backbone.named_modules()}
    model = fp.PromptedModel(backbone)
    model.add_prompt("e", fp.PromptTuning(num_virtual_tokens=3))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]), prompts="e")
    assert {n: m.training for n, m in backbone.named_modules()} == modes


def test_a_pickled_model_finds_its_attention_where_none_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pickle imports is all that a new process knows."""
    model, ids = prompted(zoo.causal("llama"), p=PREFIX), torch.arange(3, 9)[None]
    expected, content = model(input_ids=ids, prompts="p").logits, pickle.dumps(model)
    monkeypatch.delitem(AttentionInterface._global_mapping, attention.NAME)
    monkeypatch.setattr(transformers, "attention", None)
    monkeypatch.delitem(sys.modules, attention.__name__)
    torch.testing.assert_close(pickle.loads(content)(input_ids=ids, prompts="p").logits, expected)


def test_switching_the_attention_away_is_noticed() -> None:
    model = prompted(zoo.causal("llama"), p=PREFIX)
    model.set_attn_implementation("sdpa")
    with pytest.raises(fp.FastPromptError, match="reads no prompts"):
        model(input_ids=torch.tensor([[5, 6]]), prompts="p")


def test_forgetting_follows_a_changed_backbone() -> None:
    model = prompted(zoo.causal("llama"), e=fp.PromptTuning(num_virtual_tokens=4))
    ids = torch.randint(3, zoo.VOCAB, (1, 6))
    with torch.no_grad():
        model(input_ids=ids, prompts="e")
        model.backbone.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
        model.library.forget()
        got = model(input_ids=ids, prompts="e").logits
    torch.testing.assert_close(got, model(input_ids=ids, prompts="e").logits.detach(), rtol=1e-4, atol=1e-5)


def test_room_is_counted_row_by_row() -> None:
    model = prompted(zoo.causal("gpt2", n_positions=32), p=fp.PrefixTuning(num_virtual_tokens=20))
    ids, mask = torch.randint(3, zoo.VOCAB, (2, 25)), torch.ones(2, 25, dtype=torch.long)
    mask[0, 8:] = 0
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=mask, prompts=["p", None]).logits.shape[1] == 25
    bart = prompted(zoo.seq2seq("bart", max_position_embeddings=16), e=fp.PromptTuning(num_virtual_tokens=4))
    assert bart.generate(input_ids=ids[:, :10], prompts="e", **GREEDY).shape[1] == 7
    deep = prompted(zoo.seq2seq("bart", max_position_embeddings=16), p=fp.PrefixTuning(num_virtual_tokens=12))
    with pytest.raises(fp.FastPromptError, match="need 19 positions"):
        deep.generate(input_ids=ids[:, :10], prompts="p", **GREEDY)


def test_gaps_under_a_window_and_padding_a_decoder_numbers_are_refused() -> None:
    windowed = prompted(zoo.causal("mistral_window"), p=PREFIX)
    mask = torch.tensor([[1, 0, 1, 1]])
    with pytest.raises(fp.FastPromptError, match="holes"):
        windowed(input_ids=torch.full((1, 4), 5), attention_mask=mask, prompts="p")
    bart = prompted(zoo.seq2seq("bart"), p=PREFIX)
    ids = torch.full((1, 4), 5)
    with pytest.raises(fp.FastPromptError, match="on the right"):
        bart(input_ids=ids, decoder_input_ids=ids, decoder_attention_mask=torch.tensor([[0, 1, 1, 1]]), prompts="p")


def test_an_answer_outside_the_text_stays_outside() -> None:
    model = fp.PromptedModel(zoo.encoder("bert", "qa")).eval()
    model.add_prompt("e", fp.PromptTuning(num_virtual_tokens=4), seed=0)
    ids = torch.randint(3, zoo.VOCAB, (2, 7))
    inside, none = torch.tensor([2, 7]), torch.tensor([4, 7])
    both = model(input_ids=ids, start_positions=inside, end_positions=none, prompts="e").loss
    one = model(input_ids=ids[:1], start_positions=inside[:1], end_positions=none[:1], prompts="e").loss
    torch.testing.assert_close(both, one)


def test_distilbert_heads_keep_the_backbones_loss() -> None:
    model = fp.PromptedModel(zoo.encoder("distilbert", num_labels=1)).eval()
    model.add_prompt("p", PREFIX, num_labels=1)
    loss = model(input_ids=torch.full((2, 4), 5), labels=torch.tensor([0.5, 1.5]), prompts="p").loss
    assert torch.isfinite(loss)


def test_a_head_of_two_modules_answers_with_the_last_one() -> None:
    model = fp.PromptedModel(zoo.encoder("distilbert"))
    for name, count in (("a", 5), ("b", 2)):
        assert model.add_prompt(name, PREFIX, num_labels=count).head.outputs == count


def test_a_seed_covers_the_head_and_a_label_must_be_the_heads() -> None:
    model = fp.PromptedModel(zoo.encoder("bert"))
    state = torch.get_rng_state()
    a, b = (model.add_prompt(name, PREFIX, num_labels=4, seed=3) for name in "ab")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a.head.tensors()[n], t) for n, t in b.head.tensors().items())
    model.add_prompt("two", PREFIX, num_labels=2)
    ids = torch.full((2, 4), 5)
    with pytest.raises(fp.FastPromptError, match="class that the head"):
        model(input_ids=ids, labels=torch.tensor([3, 3]), prompts=["a", "two"])


def test_the_trainer_evaluates(tmp_path: Path) -> None:
    model = prompted(zoo.causal("llama"), p=PREFIX)
    rows = [{"input_ids": torch.randint(3, zoo.VOCAB, (6,))} for _ in range(4)]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.stack([r["input_ids"] for r in batch])
        return {"input_ids": ids, "labels": ids, "prompts": ["p"] * len(batch)}

    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, eval_dataset=rows, data_collator=collate)
    assert trainer.evaluate()["eval_loss"] > 0
