"""Section 3: from conversations to ids and labels. Run: pytest tests/test_prompt.py"""

import datasets
import pytest
from conftest import make_tokenizer, pair

import arciva_assistant_poc as arciva

QUESTION, ANSWER = "Wie groß ist die Vorschau?", 'Click "Größe" and choose 5.'
SECOND = [*pair(QUESTION, ANSWER), *pair("And then?", "Press Start export.")]


@pytest.mark.parametrize("messages", [pair(QUESTION, ANSWER), SECOND], ids=["one turn", "two turns"])
def test_prompt_ids_are_an_exact_prefix_of_training_ids(any_tokenizer, messages):
    item, prompt = arciva.encode(any_tokenizer, messages), arciva.encode_prompt(any_tokenizer, messages[:-1])
    assert item.input_ids[: len(prompt)] == prompt
    assert len(item.input_ids) == len(item.labels) > len(prompt)


def test_there_is_exactly_one_bos_where_the_tokenizer_has_one(any_tokenizer):
    ids = arciva.encode(any_tokenizer, SECOND).input_ids
    bos = any_tokenizer.bos_token_id
    assert bos is None or (ids[0] == bos and ids.count(bos) == 1)


def test_prompt_tokens_carry_no_loss(any_tokenizer):
    item, prompt = arciva.encode(any_tokenizer, pair(QUESTION, ANSWER)), arciva.encode_prompt(any_tokenizer, QUESTION)
    assert item.labels[: len(prompt)] == [arciva.IGNORE_INDEX] * len(prompt)


def test_every_assistant_turn_is_supervised_and_nothing_else(any_tokenizer):
    labels = arciva.encode(any_tokenizer, SECOND).labels
    runs = "".join("x" if label != arciva.IGNORE_INDEX else " " for label in labels).split()
    assert len(runs) == 2
    text = any_tokenizer.decode([label for label in labels if label != arciva.IGNORE_INDEX], skip_special_tokens=True)
    assert text == ANSWER + "Press Start export."


def test_the_end_of_turn_token_is_supervised_also_where_pad_equals_eos(any_tokenizer):
    item = arciva.encode(any_tokenizer, pair(QUESTION, ANSWER))
    assert item.labels[-1] == item.input_ids[-1] == any_tokenizer.eos_token_id
    assert item.labels[-1] in arciva.stop_token_ids(any_tokenizer)


def test_the_system_prompt_reaches_templates_without_a_system_role(any_tokenizer):
    assert arciva.SYSTEM_PROMPT in any_tokenizer.decode(arciva.encode_prompt(any_tokenizer, QUESTION))


def test_a_row_that_does_not_fit_is_reported_not_cut(chatml):
    rows = [{"id": "short", "messages": pair("a", "b")}, {"id": "long", "messages": pair("a", "b " * 300)}]
    encoded, indices, too_long = arciva.encode_split(chatml, datasets.Dataset.from_list(rows), 100)
    assert indices == [0] and len(encoded) == 1
    assert len(too_long) == 1 and too_long[0].startswith("long (")


def test_a_template_that_rewrites_history_is_refused():
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    tokenizer = make_tokenizer(rewriting, bos=None, eos="</s>", pad="</s>")
    with pytest.raises(arciva.ArcivaError, match="chat template"):
        arciva.encode(tokenizer, pair("a", "b"))


def test_a_tokenizer_without_template_gets_the_default_and_says_so(tmp_path, capsys):
    make_tokenizer(None, bos="<s>", eos="</s>", pad=None).save_pretrained(tmp_path)
    tokenizer = arciva.load_tokenizer(str(tmp_path))
    assert tokenizer.chat_template == arciva.DEFAULT_CHAT_TEMPLATE and tokenizer.pad_token == "</s>"
    assert "no chat template" in capsys.readouterr().out


def test_the_saved_template_asks_as_training_did(any_tokenizer, tmp_path):
    """A server renders the template and adds nothing; its ids must be those that the model was trained behind."""
    any_tokenizer.save_pretrained(tmp_path)
    tokenizer = arciva.load_tokenizer(str(tmp_path))
    conversation = arciva.with_system_prompt(tokenizer, pair(QUESTION, ANSWER)[:-1])
    served = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert served == arciva.encode_prompt(tokenizer, QUESTION)
