"""`fastprompt generate`: one mixed batch from the command line."""

from __future__ import annotations

import json

import pytest
import transformers

TEXTS = ("a", "hello there", "12 =")


@pytest.fixture
def loaded(backbone, prompts):
    return [
        "generate",
        "--backbone",
        backbone,
        "--prompt",
        f"soft={prompts / 'soft'}",
        "--prompt",
        f"deep={prompts / 'deep'}",
    ]


def alone(model, backbone, prompt, text, count):
    """What the library gives for one row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone)
    batch = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**batch, prompts=[prompt], max_new_tokens=count, do_sample=False)
    return tokenizer.decode(tokens[0, batch.input_ids.shape[1] :], skip_special_tokens=True)


def test_rows_of_one_batch_are_those_alone(run, loaded, model, backbone):
    options = [o for t, name in zip(TEXTS, ("soft", "none", "deep"), strict=True) for o in ("--text", t, "--use", name)]
    data = json.loads(run(*loaded, *options, "--max-new-tokens", 7, "--json").stdout)
    assert [(r["prompt"], r["text"]) for r in data["rows"]] == [("soft", "a"), (None, TEXTS[1]), ("deep", "12 =")]
    outputs = [r["output"] for r in data["rows"]]
    assert outputs == [alone(model, backbone, r["prompt"], r["text"], 7) for r in data["rows"]]
    assert len({*outputs}) == 3 and data["seconds"] > 0


def test_one_use_serves_all_and_none_is_bare(run, backbone, model, loaded):
    texts = ["--text", "x", "--text", "y"]
    one = json.loads(run(*loaded, *texts, "--use", "deep", "--max-new-tokens", 3, "--json").stdout)
    assert [r["prompt"] for r in one["rows"]] == ["deep", "deep"]
    bare = json.loads(run("generate", "--backbone", backbone, *texts, "--max-new-tokens", 3, "--json").stdout)
    assert [r["output"] for r in bare["rows"]] == [alone(model, backbone, None, t, 3) for t in "xy"]


def test_a_single_prompt_needs_no_use(run, backbone, prompts):
    options = ["--prompt", f"only={prompts / 'soft'}", "--text", "x", "--max-new-tokens", 2]
    assert json.loads(run("generate", "--backbone", backbone, *options, "--json").stdout)["rows"][0]["prompt"] == "only"
    table = run("generate", "--backbone", backbone, *options).stdout
    assert "only" in table and "rows in one batch: 1" in table


def test_lines_from_stdin(run, loaded):
    data = json.loads(
        run(*loaded, "--stdin", "--json", "--max-new-tokens", 2, input="soft\tone two\nnone\tthree\t4\r\n").stdout
    )
    assert [(r["prompt"], r["text"]) for r in data["rows"]] == [("soft", "one two"), (None, "three\t4")]


def test_an_adapter_of_peft_is_a_prompt_too(run, backbone, adapter):
    data = run(
        "generate", "--backbone", backbone, "--prompt", f"p={adapter}", "--text", "x", "--max-new-tokens", 2, "--json"
    )
    assert json.loads(data.stdout)["rows"][0]["prompt"] == "p"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--text", "x", "--text", "y", "--text", "z", "--use", "soft", "--use", "deep"], "2 times for 3 texts"),
        (["--text", "x"], "which one each --text gets"),
        ([], "there is no text"),
        (["--text", "x", "--text", "", "--use", "soft"], "a text is '', which has no tokens"),
        (["--use", "soft"], "1 times for 0 texts"),
        (["--text", "x", "--use", "sotf"], "did you mean 'soft'"),
        (["--text", "x", "--use", "soft", "--prompt", "bad"], "expected NAME=PATH"),
        (["--text", "x", "--use", "soft", "--prompt", "none=x"], "expected NAME=PATH"),
        (["--text", "x", "--use", "soft", "--prompt", "soft=x"], "given twice"),
        (["--text", "x", "--use", "soft", "--prompt", "new=./absent"], "does not exist"),
    ],
)
def test_mistakes_are_explained(fails, loaded, options, says):
    assert says in fails(*loaded, *options)


def test_bad_line_of_stdin_is_named(fails, loaded):
    assert "line 2" in fails(*loaded, "--stdin", input="soft\tx\nno tab here\n")


def test_a_model_that_does_not_generate_is_refused(fails, backbone, tmp_path):
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "bert")
    line = fails("generate", "--backbone", tmp_path / "bert", "--text", "x")
    assert "BertForSequenceClassification" in line and "generates text" in line
