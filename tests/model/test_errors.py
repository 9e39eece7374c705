"""Bad input gets a FastPromptError that names what came, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from transformers import GenerationConfig

import fastprompt as fp

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.fixture
def model() -> fp.PromptedModel:
    model = fp.PromptedModel(zoo.causal("llama"))
    model.add_prompt("one", fp.PrefixTuning(num_virtual_tokens=4))
    return model.eval()


def test_unknown_name_suggests_a_near_one(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match=r"'on'.*did you mean 'one'"):
        model(input_ids=IDS, prompts="on")
    with pytest.raises(KeyError, match=r"'two' is not loaded: loaded are 'one'"):
        model.remove_prompt("two")


@pytest.mark.parametrize("prompts", [["one"], ["one"] * 3, []])
def test_prompts_of_the_wrong_length(model: fp.PromptedModel, prompts: list[str]) -> None:
    with pytest.raises(fp.FastPromptError, match="2 rows"):
        model(input_ids=IDS, prompts=prompts)
    with pytest.raises(fp.FastPromptError, match="2 rows"):
        model.generate(input_ids=IDS, prompts=prompts, max_new_tokens=1)


@pytest.mark.parametrize("prompts", [[1, 2], [["one"], None], torch.tensor([0, 1])])
def test_prompts_that_are_not_names(model: fp.PromptedModel, prompts: object) -> None:
    with pytest.raises(fp.FastPromptError, match="expected"):
        model(input_ids=IDS, prompts=prompts)  # type: ignore[arg-type]


def test_duplicate_name(model: fp.PromptedModel, tmp_path: Path) -> None:
    before = model.library["one"]
    model.save_prompt("one", tmp_path / "one")
    for act in (
        lambda: model.add_prompt("one", fp.PromptTuning(num_virtual_tokens=2)),
        lambda: model.load_prompt("one", tmp_path / "one"),
    ):
        with pytest.raises(fp.FastPromptError, match="exists"):
            act()
    assert model.library["one"] is before
    assert model.prompt_names == ["one"]


@pytest.mark.parametrize("name", ["", None, 3])
def test_bad_names(model: fp.PromptedModel, name: object) -> None:
    with pytest.raises(fp.FastPromptError, match="name"):
        model.add_prompt(name, fp.PromptTuning(num_virtual_tokens=2))  # type: ignore[arg-type]
    assert model.prompt_names == ["one"]


def test_names_may_hold_anything_else(model: fp.PromptedModel) -> None:
    for name in ("a.b", "a/b", "tenant 7: ü", "..", "weight"):
        model.add_prompt(name, fp.PromptTuning(num_virtual_tokens=2), seed=0)
        assert model(input_ids=IDS, prompts=name).logits.shape == (2, 3, zoo.VOCAB)
    assert len(model.state_dict()) > 0


def test_prompt_of_another_backbone(model: fp.PromptedModel, tmp_path: Path) -> None:
    model.save_prompt("one", tmp_path / "one")
    other = fp.PromptedModel(zoo.causal("gpt2"))
    with pytest.raises(fp.FastPromptError, match=r"llama.*gpt2|gpt2.*llama"):
        other.load_prompt("one", tmp_path / "one")
    assert other.prompt_names == []
    with pytest.raises(fp.FastPromptError, match="llama"):
        other.add_prompt("one", model.library["one"])


def test_prefix_on_an_architecture_that_takes_none() -> None:
    model = fp.PromptedModel(zoo.encoder("deberta"))
    with pytest.raises(fp.FastPromptError, match="PromptTuning"):
        model.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=2))
    assert model.prompt_names == []


def test_more_positions_than_the_backbone_has() -> None:
    model = fp.PromptedModel(zoo.causal("gpt2", n_positions=16))
    model.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=10))
    assert model(input_ids=torch.full((1, 6), 5), prompts="p").logits.shape[1] == 6
    with pytest.raises(fp.FastPromptError, match=r"17 positions, the backbone has 16"):
        model(input_ids=torch.full((1, 7), 5), prompts="p")


def test_prompts_must_be_a_config_and_backbones_a_model(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="PrefixTuning"):
        model.add_prompt("x", {"num_virtual_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(fp.FastPromptError, match=r"config is the class PrefixTuning"):
        model.add_prompt("x", fp.PrefixTuning)  # type: ignore[arg-type]
    with pytest.raises(fp.FastPromptError, match="PreTrainedModel"):
        fp.PromptedModel(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_full_bank_says_so_and_recovers() -> None:
    model = fp.PromptedModel(zoo.causal("llama"), bank_bytes=20_000)
    for i in range(3):
        model.add_prompt(f"p{i}", fp.PrefixTuning(num_virtual_tokens=20), seed=i)
    model.eval()
    with torch.no_grad():
        with pytest.raises(fp.FastPromptError, match="bytes"):
            model(input_ids=torch.full((3, 4), 5), prompts=["p0", "p1", "p2"])
        for name in model.prompt_names:  # one at a time they fit, evicting one another
            assert torch.isfinite(model(input_ids=IDS, prompts=name).logits).all()


def test_text_init_without_a_tokenizer(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="tokenizer"):
        model.add_prompt("t", fp.PromptTuning(num_virtual_tokens=3, init="text", init_text="say"))


def test_a_head_where_there_is_none(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="no task head"):
        model.add_prompt("h", fp.PrefixTuning(num_virtual_tokens=3), num_labels=4)


def test_unknown_format(model: fp.PromptedModel, tmp_path: Path) -> None:
    with pytest.raises(fp.FastPromptError, match="peft"):
        model.save_prompt("one", tmp_path / "x", format="pickle")
    assert not (tmp_path / "x").exists()
    with pytest.raises(fp.FastPromptError):
        model.load_prompt("y", tmp_path / "nowhere")


def test_nothing_at_all(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="input_ids"):
        model(prompts="one")


@pytest.mark.parametrize("ids", [[[5, 6]], "hello", IDS[0], IDS[:, :0], IDS[:0], IDS.float()], ids=repr)
def test_ids_that_are_no_batch_of_tokens(model: fp.PromptedModel, ids: object) -> None:
    for act in (model, model.generate):
        with pytest.raises(fp.FastPromptError, match=r"input_ids is .*, expected .*int64"):
            act(ids, prompts="one")


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (3, 3)])
def test_masks_of_other_tokens(model: fp.PromptedModel, shape: tuple[int, int]) -> None:
    with pytest.raises(fp.FastPromptError, match=r"attention_mask is \[.*expected \[2, 3\]"):
        model(IDS, torch.ones(shape, dtype=torch.long), prompts="one")


@pytest.mark.parametrize("name", ["prompt", "adapter_names", "task_ids"])
def test_an_argument_that_a_backbone_would_ignore(model: fp.PromptedModel, name: str) -> None:
    with pytest.raises(fp.FastPromptError, match=f"{name} is no argument.*give prompts"):
        model(IDS, **{name: ["one", "one"]})


def test_an_encoder_does_not_generate() -> None:
    encoder = fp.PromptedModel(zoo.encoder("bert"))
    encoder.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=3))
    with pytest.raises(fp.FastPromptError, match="BertForSequenceClassification does not generate"):
        encoder.generate(IDS, prompts="p")


def test_paths_seeds_and_budgets_that_are_none(model: fp.PromptedModel, tmp_path: Path) -> None:
    model.save_prompt("one", tmp_path / "one")
    prefix = fp.PrefixTuning(num_virtual_tokens=3)
    for act, told in (
        (lambda: model.load_prompt("x", 5), "path is int"),
        (lambda: model.load_prompt("x", tmp_path / "one", task_id=1), "task_id is 1.*no PEFT adapter"),
        (lambda: model.add_prompt("x", prefix, seed="a"), "seed is 'a'"),
        (lambda: model.add_prompt("x", prefix, seed=2**70), f"seed is {2**70}"),
        (lambda: fp.PromptedModel(zoo.causal("llama"), bank_bytes="1G"), "bank_bytes is '1G'"),
        (lambda: fp.PromptedModel.from_peft(zoo.causal("llama")), "peft_model is LlamaForCausalLM"),
    ):
        with pytest.raises(fp.FastPromptError, match=told):
            act()
    assert model.prompt_names == ["one"]


def test_four_dimensional_masks_are_refused_with_prompts(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="attention_mask"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 3, 3), prompts="one")


def test_masks_that_leave_no_place_for_prompts(model: fp.PromptedModel) -> None:
    t5 = fp.PromptedModel(zoo.seq2seq("t5"))
    t5.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=3))
    with pytest.raises(fp.FastPromptError, match="decoder_attention_mask"):
        t5(input_ids=IDS, decoder_input_ids=IDS, decoder_attention_mask=torch.ones(2, 1, 3, 3), prompts="p")


def test_labels_that_contradict(model: fp.PromptedModel) -> None:
    classify = fp.PromptedModel(zoo.encoder("bert"))
    with pytest.raises(fp.FastPromptError, match="num_labels is 5, but labels names 2"):
        classify.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=3), num_labels=5, labels=["a", "b"])
    with pytest.raises(fp.FastPromptError, match=r"labels is \[0, 1\], expected .* name"):
        classify.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=3), labels=[0, 1])
    with pytest.raises(fp.FastPromptError, match="fresh prompt"):
        model.add_prompt("p", model.library["one"].collapse(), seed=3)
    assert classify.prompt_names == []


def test_generating_past_the_backbones_positions() -> None:
    model = fp.PromptedModel(zoo.causal("gpt2", n_positions=32))
    model.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=10))
    with pytest.raises(fp.FastPromptError, match=r"20 to generate need 33 positions"):
        model.generate(input_ids=IDS, prompts="p", max_new_tokens=20, do_sample=False)
    for limit in (20, 23):
        config = GenerationConfig(**({"max_new_tokens": 20} if limit == 20 else {"max_length": 23}), do_sample=False)
        with pytest.raises(fp.FastPromptError, match=r"20 to generate need 33 positions"):
            model.generate(input_ids=IDS, prompts="p", generation_config=config)


def test_an_encoders_positions_hold_prompt_and_text() -> None:
    model = fp.PromptedModel(zoo.encoder("bert", max_position_embeddings=16))
    model.add_prompt("p", fp.PromptTuning(num_virtual_tokens=14))
    with pytest.raises(fp.FastPromptError, match="17 positions, the backbone has 16"):
        model(input_ids=IDS, prompts="p")


def test_the_cache_path_refuses_what_it_would_get_wrong() -> None:
    model = fp.PromptedModel(zoo.causal("gptj"))
    model.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=3))
    embeds = model.backbone.get_input_embeddings()(IDS)
    with pytest.raises(fp.FastPromptError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, prompts="p", max_new_tokens=2)


def test_saving_the_whole_without_its_prompts_is_refused(model: fp.PromptedModel, tmp_path: Path) -> None:
    with pytest.raises(fp.FastPromptError, match="save_prompt"):
        model.save_pretrained(tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_an_id_that_is_nowhere(model: fp.PromptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(fp.FastPromptError, match="prompts/missing is no folder here"):
        model.load_prompt("x", "prompts/missing")


def test_a_decoder_that_is_not_all_attention() -> None:
    """Prefixes enter its attention layers; embedding prompts work in forward, and generate refuses them."""
    import transformers as tf

    arguments = zoo.CAUSAL["llama"][1] | dict(
        layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    )
    model = fp.PromptedModel(tf.Lfm2ForCausalLM(tf.Lfm2Config(**arguments)).eval()).eval()
    model.add_prompt("prefix", fp.PrefixTuning(num_virtual_tokens=3))
    model.add_prompt("embed", fp.PromptTuning(num_virtual_tokens=4))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        mixed = model(input_ids=IDS, attention_mask=mask, prompts=["prefix", "embed"]).logits
        alone = model(input_ids=IDS[1:, :2], prompts=["embed"]).logits
    torch.testing.assert_close(mixed[1:, :2], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(fp.FastPromptError, match="prefixes only"):
        model.generate(input_ids=IDS, prompts=["prefix", "embed"], max_new_tokens=2)


def test_a_head_for_a_module_the_backbone_lacks(tmp_path: Path) -> None:
    classify = fp.PromptedModel(zoo.encoder("bert"))
    prompt = classify.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=3), num_labels=2)
    bare = fp.PromptedModel(zoo.encoder("bert", "qa"))
    with pytest.raises(fp.FastPromptError, match=r"head for classifier.*BertForQuestionAnswering"):
        bare.add_prompt("p", prompt.collapse())
    assert bare.prompt_names == []
