"""What the backbone can do it can still do with prompts: checkpointing, casting, compiling, packing, pipelines."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from feature_cases import ROWS, loud, padded, prompted

import fastprompt as fp


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return padded()


def targets(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels of the real tokens but each row's first, which padding would have to predict."""
    first = inputs["attention_mask"].cumsum(1) <= 1
    return inputs["input_ids"].masked_fill(first | (inputs["attention_mask"] == 0), -100)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, inputs: dict[str, torch.Tensor]) -> None:
    quiet = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0} if name == "gpt2" else {}
    model = prompted(zoo.causal(name, **quiet))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        other: list[str | None] = ["embed", "prefix", None, None]
        losses = [model(**inputs, labels=targets(inputs), prompts=rows).loss for rows in (ROWS, other)]
        sum(losses).backward()  # two forwards of different rows before one backward
        grads.append({n: p.grad.clone() for n, p in model.library.named_parameters()})
    assert all(g.abs().max() > 0 for g in grads[0].values())
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-6)


def test_checkpointing_that_would_lose_gradients_is_refused() -> None:
    with pytest.raises(fp.FastPromptError, match="use_reentrant"):
        prompted(zoo.causal("llama")).gradient_checkpointing_enable(dict(use_reentrant=True))
    with pytest.raises(fp.FastPromptError, match="cache"):
        prompted(zoo.causal("bloom")).gradient_checkpointing_enable()


def test_gradients_of_a_mixed_batch_are_sums_of_single_rows(inputs: dict[str, torch.Tensor]) -> None:
    model = prompted(zoo.causal("llama"))
    labels = targets(inputs)
    total = int((labels != -100).sum())
    model(**inputs, labels=labels, prompts=ROWS).loss.backward()
    mixed = {n: p.grad.clone() for n, p in model.library.named_parameters()}
    model.zero_grad()
    for b, row in enumerate(ROWS):
        if row is None:
            continue
        real = inputs["attention_mask"][b].bool()
        ids, wanted = inputs["input_ids"][b : b + 1, real], labels[b : b + 1, real]
        (model(input_ids=ids, labels=wanted, prompts=[row]).loss * (wanted != -100).sum() / total).backward()
    for n, p in model.library.named_parameters():
        torch.testing.assert_close(p.grad, mixed[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_backbone_with_float32_prompts(dtype: torch.dtype, inputs: dict[str, torch.Tensor]) -> None:
    full = prompted(zoo.causal("llama"))
    low = fp.PromptedModel(copy.deepcopy(full.backbone).to(dtype))
    for name in full.prompt_names:
        low.add_prompt(name, full.library[name].collapse())
    assert all(p.dtype == torch.float32 for p in low.library.parameters())
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = full(**inputs, prompts=ROWS).logits[real]
        got = low.eval()(**inputs, prompts=ROWS).logits[real]
        bare_error = (low(**inputs).logits[real].float() - full(**inputs).logits[real]).abs().max()
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() <= 2 * bare_error  # no worse than the dtype itself
    loss = low(**inputs, labels=inputs["input_ids"], prompts=ROWS).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in low.library.parameters())


def test_cast_and_move_keep_prompts_float32() -> None:
    model = prompted(zoo.causal("llama")).to(torch.bfloat16)
    assert model.backbone.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.library.parameters())
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]]), prompts="prefix").logits.dtype == torch.bfloat16


def test_bare_calls_are_the_backbone_itself(inputs: dict[str, torch.Tensor]) -> None:
    for name in ("llama", "gemma2", "gpt_oss", "t5"):
        backbone = zoo.seq2seq(name) if name == "t5" else zoo.causal(name)
        untouched = copy.deepcopy(backbone)
        model = prompted(backbone)
        call = dict(inputs) | ({"decoder_input_ids": inputs["input_ids"]} if name == "t5" else {})
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            torch.testing.assert_close(model(**call).logits[real], untouched(**call).logits[real], rtol=1e-5, atol=1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    """Two texts packed in one row by position_ids: each sees the prompt and itself only."""
    model = prompted(zoo.causal("llama"))
    a, b = torch.randint(3, zoo.VOCAB, (1, 5)), torch.randint(3, zoo.VOCAB, (1, 7))
    packed = dict(input_ids=torch.cat([a, b], 1), position_ids=torch.cat([torch.arange(5), torch.arange(7)])[None])
    with torch.no_grad():
        together = model(**packed, use_cache=False, prompts="prefix").logits[0]
        alone = torch.cat([model(input_ids=x, prompts="prefix").logits[0] for x in (a, b)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_retrained_prompt_is_read_anew() -> None:
    model = prompted(zoo.causal("llama"))
    ids = torch.randint(3, zoo.VOCAB, (1, 6))
    with torch.no_grad():
        before = model(input_ids=ids, prompts="prefix").logits
        model.library["prefix"].encoder.weight.mul_(1.5)
        after = model(input_ids=ids, prompts="prefix").logits
    with torch.enable_grad():
        trained = model(input_ids=ids, prompts="prefix").logits.detach()
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, trained, rtol=1e-4, atol=1e-5)


def test_autocast(inputs: dict[str, torch.Tensor]) -> None:
    model = prompted(zoo.causal("llama"))
    real = inputs["attention_mask"].bool()
    model(**inputs, labels=targets(inputs), prompts=ROWS).loss.backward()
    exact = {n: p.grad.clone() for n, p in model.library.named_parameters()}
    model.zero_grad()
    with torch.no_grad():
        expected = model(**inputs, prompts=ROWS).logits[real]
        bare = model(**inputs).logits[real]
        with torch.autocast("cpu", torch.bfloat16):
            got, bare_error = model(**inputs, prompts=ROWS).logits[real], model(**inputs).logits[real] - bare
    assert (got - expected).abs().max() <= 2 * bare_error.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=targets(inputs), prompts=ROWS).loss
    loss.backward()
    for n, p in model.library.named_parameters():
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), exact[n].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_classifying_decoder_pools_the_last_real_token(name: str, side: str) -> None:
    import transformers

    prefix, arguments = zoo.CAUSAL[name]
    cls = getattr(transformers, f"{prefix}ForSequenceClassification")
    torch.manual_seed(0)
    model = fp.PromptedModel(cls(zoo.config(prefix, arguments, pad_token_id=0, num_labels=3)))
    model.add_prompt("prefix", fp.PrefixTuning(num_virtual_tokens=9), num_labels=4)
    model.add_prompt("embed", fp.PromptTuning(num_virtual_tokens=4))
    loud(model)
    ids = torch.randint(3, zoo.VOCAB, (4, 10))
    lengths = torch.tensor([10, 3, 7, 1])[:, None]
    mask = (torch.arange(10) < lengths) if side == "right" else (torch.arange(10) >= 10 - lengths)
    with torch.no_grad():
        mixed = model(input_ids=ids * mask, attention_mask=mask.long(), prompts=ROWS).logits
        for b, row in enumerate(ROWS):
            alone = model(input_ids=ids[b : b + 1, mask[b]], prompts=[row]).logits[0]
            torch.testing.assert_close(mixed[b, : alone.shape[0]], alone, rtol=1e-4, atol=1e-5)
            assert mixed[b, alone.shape[0] :].isneginf().all()


def test_tuple_outputs() -> None:
    for backbone in (zoo.causal("llama"), zoo.encoder("bert")):
        model = prompted(backbone)
        ids = torch.randint(3, zoo.VOCAB, (4, 6))
        with torch.no_grad():
            named = model(input_ids=ids, prompts=ROWS)
            plain = model(input_ids=ids, prompts=ROWS, return_dict=False)
        assert isinstance(plain, tuple)
        torch.testing.assert_close(plain[0], named.logits)


def test_labels_of_virtual_tokens_do_not_count() -> None:
    model = fp.PromptedModel(zoo.encoder("bert", "token_cls"))
    model.add_prompt("embed", fp.PromptTuning(num_virtual_tokens=5))
    model.eval()
    ids, labels = torch.randint(3, zoo.VOCAB, (2, 6)), torch.tensor([[0, 1, -100, 0, 1, 1], [1, 1, 0, 0, -100, -100]])
    out = model(input_ids=ids, labels=labels, prompts=["embed", None])
    assert out.logits.shape[1] == 6
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


def test_the_whole_model_under_torch_compile(inputs: dict[str, torch.Tensor]) -> None:
    model = prompted(zoo.causal("llama"))
    with torch.no_grad():
        expected = model(**inputs, prompts=ROWS).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs, prompts=ROWS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_takes_the_model() -> None:
    from transformers import pipeline

    from fastprompt import demo

    model = fp.PromptedModel(demo.backbone())
    model.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=5), seed=0)
    generator = pipeline("text-generation", model=loud(model), tokenizer=demo.tokenizer())
    options = dict(max_new_tokens=4, do_sample=False)
    bare, with_prompt = (generator("the capital of", prompts=p, **options)[0]["generated_text"] for p in (None, "p"))
    assert bare != with_prompt
