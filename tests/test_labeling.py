"""Labelling: export, import, and what the build makes of the reviews. Run: pytest tests/test_labeling.py"""

import json
import unicodedata
from pathlib import Path

import build_corpus
import labeling
import pytest
import yaml
from conftest import pair, write_rows

import arciva_assistant_poc as arciva

FACTS = {
    "export-start": {"topic": "export", "audience": "photographer", "labels": ["Start export", "Größe"]},
    "tagging-add": {"topic": "tagging", "audience": "photographer", "labels": ["Add new tag"]},
}
ENTRIES = {
    "export": [
        {
            "id": "export-begin",
            "kind": "how-to",
            "common": False,
            "fact_ids": ["export-start"],
            "must": ["Start export"],
            "questions": {
                "en": [{"polite": "How do I export?"}, {"alias": "Which button exports?"}, {"keywords": "export how"}],
                "de": [{"plain": "Wie exportiere ich die Größe?"}],
            },
            "answers": {
                "en": {"full": 'Choose a size and press "Start export".', "short": 'Press "Start export".'},
                "de": {"full": 'Wähle die "Größe" und klicke auf "Start export".'},
            },
        }
    ],
    "tagging": [
        {
            "id": "tagging-add",
            "kind": "where",
            "common": False,
            "fact_ids": ["tagging-add"],
            "must": ["Add new tag"],
            "questions": {
                "en": [{"plain": "Where do I add a tag?"}],
                "de": [{"plain": "Wo füge ich einen Tag hinzu?"}],
            },
            "answers": {
                "en": {"full": 'In the dialog, with "Add new tag".'},
                "de": {"full": 'Im Dialog mit "Add new tag".'},
            },
        }
    ],
}
BETTER = 'First choose a size, then press "Start export" in the panel.'


@pytest.fixture
def knowledge(tmp_path, monkeypatch) -> Path:
    """Two entries in a folder of their own, in place of the real knowledge."""
    folder = tmp_path / "knowledge"
    folder.mkdir()
    for topic, entries in ENTRIES.items():
        document = yaml.safe_dump({"topic": topic, "entries": entries}, allow_unicode=True)
        (folder / f"{topic}.yaml").write_text(document, encoding="utf-8")
    (folder / "facts.yaml").write_text(yaml.safe_dump(FACTS, allow_unicode=True), encoding="utf-8")
    monkeypatch.setattr(build_corpus, "KNOWLEDGE", folder)
    return folder


def built() -> dict[str, dict]:
    """Rows of the extended corpus by id, as a build would write them now."""
    entries, problems = build_corpus.load_entries(build_corpus.knowledge_files())
    assert problems == []
    rows = map(json.loads, build_corpus.build(entries)[build_corpus.EXTENDED].splitlines())
    return {row["id"]: row for row in rows}


def exported(tmp_path: Path, form: str = "instruction") -> dict[str, dict]:
    """Rows as the labelling tool gets them, by their question."""
    corpus = write_rows(tmp_path / "corpus.jsonl", list(built().values()))
    assert labeling.main(["export", str(corpus), "--format", form, "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["messages"][0]["content"] if form == "messages" else row["instruction"]: row for row in rows}


def review(
    row: dict, label: str, *, answer: str | None = None, question: str | None = None, time: str = "2026-01-05T10:00:00Z"
):
    """The row as the labelling tool writes it back."""
    form = "messages" if "messages" in row else "instruction"
    metadata = {"status": label.split()[-1].lower(), "label": label, "timestamp": time, "format": form}
    row = json.loads(json.dumps(row)) | {"review_metadata": metadata}
    if form == "messages":
        row["messages"][0]["content"] = question or row["messages"][0]["content"]
        row["messages"][1]["content"] = answer or row["messages"][1]["content"]
        return row
    key = "output" if "output" in row else "response"
    return row | {"instruction": question or row["instruction"], key: answer or row[key]}


def take(tmp_path: Path, *files: list[dict], options: tuple[str, ...] = ()) -> int:
    paths = [write_rows(tmp_path / f"reviewed-{i}.jsonl", rows) for i, rows in enumerate(files)]
    return labeling.main(["import", *map(str, paths), *options])


def overrides(knowledge: Path) -> dict[str, dict]:
    path = knowledge / "overrides.jsonl"
    return (
        {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
        if path.exists()
        else {}
    )


@pytest.mark.parametrize("form", ["messages", "instruction"])
def test_an_exported_row_carries_all_that_leads_back_to_it(knowledge, tmp_path, form):
    rows = exported(tmp_path, form)
    assert {row["id"] for row in rows.values()} == set(built()) and len(rows) == 6
    for question, row in rows.items():
        source = built()[row["id"]]
        assert {key: row[key] for key in labeling.KEPT} == {key: source[key] for key in labeling.KEPT}
        words = {"messages": pair(question, source["response"])}
        assert words.items() <= row.items() or row["output"] == source["response"]
        assert ("messages" in row) == (form == "messages") and ("output" in row) == (form == "instruction")


def test_an_export_can_be_loaded_as_training_data(knowledge, tmp_path):
    exported(tmp_path, "messages")
    examples, _ = arciva.load_examples(str(tmp_path / "out.jsonl"))
    assert {e.id: e.messages[-1]["content"] for e in examples} == {i: row["response"] for i, row in built().items()}


@pytest.mark.parametrize("form", ["messages", "instruction"])
def test_verified_stays_modified_replaces_and_discarded_goes(knowledge, tmp_path, form):
    rows, before = exported(tmp_path, form), built()
    files = [
        review(rows["Where do I add a tag?"], "✅ Verified"),
        review(rows["How do I export?"], "✍️ Modified", answer=BETTER),
        review(rows["export how"], "🗑️ Discarded"),
    ]
    assert take(tmp_path, files) == 0
    after, changed, gone = built(), rows["How do I export?"]["id"], rows["export how"]["id"]
    assert set(before) - set(after) == {gone}
    assert after[changed] == before[changed] | {"response": BETTER}
    assert all(after[i] == before[i] for i in after if i != changed)
    written = overrides(knowledge)
    assert set(written) == {changed, gone}
    assert (
        written[gone]["discard"] is True and written[changed]["answer"] == BETTER and "question" not in written[changed]
    )
    assert written[changed]["reviewed"] == "2026-01-05T10:00:00Z"


def test_a_row_keeps_its_id_when_its_question_is_changed(knowledge, tmp_path):
    row = exported(tmp_path)["How do I export?"]
    assert take(tmp_path, [review(row, "✍️ Modified", question="How can I get my photos out?")]) == 0
    assert built()[row["id"]]["instruction"] == "How can I get my photos out?"
    assert built()[row["id"]]["response"] == row["output"]


def test_importing_twice_changes_nothing(knowledge, tmp_path, capsys):
    rows = exported(tmp_path)
    reviewed = [
        review(rows["How do I export?"], "✍️ Modified", answer=BETTER, question="How do I begin an export?"),
        review(rows["export how"], "🗑️ Discarded"),
        review(rows["Where do I add a tag?"], "✅ Verified"),
    ]
    assert take(tmp_path, reviewed) == 0
    first = (knowledge / "overrides.jsonl").read_bytes()
    assert take(tmp_path, reviewed) == 0 and take(tmp_path, reviewed, reviewed) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert (knowledge / "overrides.jsonl").read_bytes() == first


def test_existing_overrides_stay(knowledge, tmp_path):
    rows = exported(tmp_path)
    assert take(tmp_path, [review(rows["export how"], "🗑️ Discarded")]) == 0
    first = overrides(knowledge)
    assert take(tmp_path, [review(rows["How do I export?"], "✍️ Modified", answer=BETTER)]) == 0
    assert first.items() <= overrides(knowledge).items() and len(overrides(knowledge)) == 2


@pytest.mark.parametrize("files", [1, 2])
def test_the_newer_of_two_reviews_that_disagree_does_not_win(knowledge, tmp_path, capsys, files):
    rows = exported(tmp_path)
    old = review(rows["How do I export?"], "✅ Verified", time="2026-01-01T00:00:00Z")
    new = review(rows["How do I export?"], "✍️ Modified", answer=BETTER, time="2026-02-01T00:00:00Z")
    other = review(rows["export how"], "🗑️ Discarded")
    arguments = [[old, new, other]] if files == 1 else [[old, other], [new]]
    assert take(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert "reviewed differently" in error and "reviewed-0.jsonl, line 1" in error
    assert ("reviewed-0.jsonl, line 2" if files == 1 else "reviewed-1.jsonl, line 1") in error
    assert overrides(knowledge) == {}
    assert take(tmp_path, *arguments, options=("--keep-going",)) == 0
    assert set(overrides(knowledge)) == {rows["export how"]["id"]}


def test_two_reviews_that_agree_count_once(knowledge, tmp_path):
    row = review(exported(tmp_path)["How do I export?"], "✍️ Modified", answer=BETTER)
    assert take(tmp_path, [row], [row]) == 0
    assert len(overrides(knowledge)) == 1


BROKEN = {
    "not JSON": '{"id": "x", "instruction": ',
    "expected 'instruction' with 'response'": '{"id": "x", "review_metadata": {"label": "✅ Verified"}}',
    "is empty": '{"instruction": "a", "output": " ", "review_metadata": {"label": "✅ Verified"}}',
    "review_metadata: Input should be a valid dict": '{"instruction": "a", "output": "b", "review_metadata": "✅ Verified"}',
    "id 'no-such-row' is not in the corpus": '{"id": "no-such-row", "instruction": "a", "output": "b", "review_metadata": {"label": "✅ Verified"}}',
    "no id, and the question is not in the corpus": '{"instruction": "never asked", "output": "b", "review_metadata": {"label": "✅ Verified"}}',
    "disagree": '{"instruction": "a", "output": "b", "review_metadata": {"label": "✅ Verified", "status": "discarded"}}',
    "'response' and 'output' differ": '{"instruction": "a", "output": "b", "response": "c", "review_metadata": {"label": "✅ Verified"}}',
    "'messages' and 'instruction' differ": json.dumps(
        {"instruction": "a", "output": "b", "messages": pair("a", "c"), "review_metadata": {"label": "✅ Verified"}}
    ),
    "--conversations FILE takes": json.dumps(
        {"id": "chat", "messages": pair("a", "b") + pair("c", "d"), "review_metadata": {"label": "✅ Verified"}}
    ),
}


def test_every_problem_is_named_at_once_and_nothing_is_written(knowledge, tmp_path, capsys):
    rows = exported(tmp_path)
    good = review(rows["How do I export?"], "✍️ Modified", answer=BETTER)
    unreviewed = [rows["export how"], review(rows["export how"], "Unverified"), rows["Where do I add a tag?"]]
    lines = [*BROKEN.values(), "", *(json.dumps(row) for row in [good, *unreviewed])]
    path = tmp_path / "reviewed.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    bad = tmp_path / "latin.jsonl"
    bad.write_bytes("Größe".encode("latin-1"))
    arguments = ["import", str(path), str(bad), str(tmp_path / "missing.jsonl")]
    assert labeling.main(arguments) == 2
    error = capsys.readouterr().err
    for number, words in enumerate(BROKEN, 1):
        assert any(f"reviewed.jsonl, line {number}:" in line and words in line for line in error.splitlines()), words
    # Ten broken lines, an empty one and the good one: the rows without a verdict stand in lines 13 to 15.
    assert "reviewed.jsonl: 3 rows without a verdict, line 13-15" in error
    assert "latin.jsonl: cannot be read" in error and "missing.jsonl: cannot be read" in error
    assert f"{len(BROKEN) + 3} problems, nothing written" in error
    assert overrides(knowledge) == {} and not list(knowledge.glob(".*"))
    assert labeling.main([*arguments, "--keep-going"]) == 0
    assert set(overrides(knowledge)) == {good["id"]}


def test_a_tool_that_drops_the_ids_leaves_the_question(knowledge, tmp_path):
    row = review(exported(tmp_path, "messages")["How do I export?"], "✍️ Modified", answer=BETTER)
    bare = {"messages": row["messages"], "review_metadata": row["review_metadata"]}
    assert take(tmp_path, [bare]) == 0
    assert set(overrides(knowledge)) == {row["id"]}


def test_response_is_read_as_output_and_a_system_turn_is_no_part_of_the_words(knowledge, tmp_path):
    rows = exported(tmp_path)
    with_response = {key: value for key, value in rows["How do I export?"].items() if key not in ("output", "input")}
    first = review(with_response | {"response": rows["How do I export?"]["output"]}, "✍️ Modified", answer=BETTER)
    talk = exported(tmp_path, "messages")["Where do I add a tag?"]
    second = review(talk, "✅ Verified")
    second["messages"].insert(0, {"role": "system", "content": "You help."})
    assert take(tmp_path, [first, second]) == 0
    assert set(overrides(knowledge)) == {first["id"]}


def test_line_ends_outer_space_and_decomposed_umlauts_are_no_change(knowledge, tmp_path):
    row = exported(tmp_path)["Wie exportiere ich die Größe?"]
    words = [unicodedata.normalize("NFD", f" {row[key]}\r\n") for key in ("instruction", "output")]
    assert words[0] != row["instruction"]
    assert take(tmp_path, [review(row, "✅ Verified", question=words[0], answer=words[1])]) == 0
    assert overrides(knowledge) == {}


def test_a_line_separator_inside_an_answer_ends_no_line(knowledge, tmp_path):
    answer = f"{BETTER}\u2028Done."  # a line end to Unicode, none to JSON
    row = exported(tmp_path)["How do I export?"]
    assert take(tmp_path, [review(row, "✍️ Modified", answer=answer)]) == 0
    assert take(tmp_path, [review(row, "✍️ Modified", answer=answer)]) == 0
    assert built()[row["id"]]["response"] == f"{BETTER}\nDone."
    chat = conversation(messages=pair("a", answer) + pair("c", "d"))
    path = tmp_path / "conversations.jsonl"
    assert take(tmp_path, [chat], options=("--conversations", str(path))) == 0
    assert len(arciva.load_examples(str(path))[0]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": BETTER}, "is verified, but its words are not the corpus's"),
        ({"topic": "tagging"}, "says topic 'tagging', the corpus 'export'"),
        ({"language": "de"}, "says language 'de'"),
    ],
)
def test_a_verified_row_that_is_not_the_corpus_s_row_is_reported(knowledge, tmp_path, capsys, change, words):
    row = exported(tmp_path)["How do I export?"]
    reviewed = review(
        row | {k: v for k, v in change.items() if k != "answer"}, "✅ Verified", answer=change.get("answer")
    )
    assert take(tmp_path, [reviewed]) == 2
    assert words in capsys.readouterr().err and overrides(knowledge) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": "Press the button in the panel."}, "lacks required 'Start export'"),
        ({"answer": f'{BETTER} Or press "Send now".'}, "quotes 'Send now'"),
        ({"answer": f'{BETTER} Das ist der Weg und es gibt nicht mehr zu tun, wenn du die Fotos auf der Liste siehst.'}, "does not read as en"),
        ({"question": "which BUTTON exports?!"}, "asks already"),
    ],
)  # fmt: skip
def test_modified_words_must_pass_the_lint(knowledge, tmp_path, capsys, change, words):
    rows = exported(tmp_path)
    reviewed = [review(rows["How do I export?"], "✍️ Modified", **change), review(rows["export how"], "🗑️ Discarded")]
    assert take(tmp_path, reviewed) == 2
    error = capsys.readouterr().err
    assert "reviewed-0.jsonl, line 1" in error and words in error
    assert take(tmp_path, reviewed, options=("--keep-going",)) == 0
    assert set(overrides(knowledge)) == {rows["export how"]["id"]}


def test_a_second_review_counts_only_if_it_was_made_of_the_first_one_s_words(knowledge, tmp_path, capsys):
    old = exported(tmp_path)["How do I export?"]
    assert take(tmp_path, [review(old, "✍️ Modified", answer=BETTER)]) == 0
    third = BETTER.replace("panel", "export panel")
    assert take(tmp_path, [review(old, "✍️ Modified", answer=third, time="2030-01-01")]) == 2
    assert "other words than the corpus has now" in capsys.readouterr().err
    bare = {key: value for key, value in old.items() if key != "revision"}
    assert take(tmp_path, [review(bare, "✍️ Modified", answer=third)]) == 2
    assert "differs from an earlier review" in capsys.readouterr().err
    assert built()[old["id"]]["response"] == BETTER
    new = exported(tmp_path)["How do I export?"]
    assert take(tmp_path, [review(new, "✍️ Modified", answer=third)]) == 0
    assert built()[old["id"]]["response"] == third
    newest = exported(tmp_path)["How do I export?"]
    assert take(tmp_path, [review(newest, "✍️ Modified", answer=old["output"])]) == 0
    assert overrides(knowledge) == {}, "back to the authored words, no override is needed"


def test_a_discarded_row_does_not_come_back_by_an_older_file(knowledge, tmp_path, capsys):
    row = exported(tmp_path)["export how"]
    assert take(tmp_path, [review(row, "🗑️ Discarded")]) == 0
    assert take(tmp_path, [review(row, "✅ Verified", time="2030-01-01")]) == 2
    assert row["id"] not in built() and overrides(knowledge)[row["id"]]["discard"]


def test_a_broken_override_file_is_left_alone(knowledge, tmp_path, capsys):
    path = knowledge / "overrides.jsonl"
    path.write_text('{"id": "export-begin/en/0", "discard": true}\n{"id": \n')
    before = path.read_bytes()
    rows = exported_from_authored(tmp_path)
    assert take(tmp_path, [review(rows[0], "🗑️ Discarded")], options=("--keep-going",)) == 2
    assert "overrides.jsonl: line 2" in capsys.readouterr().err
    assert path.read_bytes() == before


def exported_from_authored(tmp_path: Path) -> list[dict]:
    entries, _ = build_corpus.load_entries(build_corpus.knowledge_files())
    return [row for entry in entries for row in entry.rows()]


def test_other_rows_with_the_answer_that_was_changed_are_pointed_out(knowledge, tmp_path, capsys):
    row = exported(tmp_path)["How do I export?"]
    assert take(tmp_path, [review(row, "✍️ Modified", answer=BETTER)]) == 0
    assert f"{row['id']}: 1 other rows keep the answer it had" in capsys.readouterr().out


# Labels from the dashboard: tests/test_dashboard_page.py takes one that a browser wrote through the same import


def generation(row: dict, label: str, answer: str, **fields) -> dict:
    """A label as the page writes it, of a model's answer to a row of the corpus."""
    return {
        "id": f"generation/0123456789abcdef/{row['id']}",
        "messages": pair(row["instruction"], answer),
        **{key: row[key] for key in labeling.KEPT},
        "source": "dashboard",
        "adapter": "0123456789abcdef",
        "row": row["id"],
        "split": "train",
        "novelty": "rephrased",
        "suite": None,
        "reference": row["response"],
        "generated": "Press it.",
        "review_metadata": {
            "status": "reviewed",
            "label": label,
            "timestamp": "2026-01-05T10:00:00Z",
            "format": "messages",
        },
    } | fields


@pytest.fixture
def kept(tmp_path) -> Path:
    return tmp_path / "generations.jsonl"


def test_a_judged_generation_leaves_the_corpus_alone_and_is_kept(knowledge, tmp_path, kept, capsys):
    row, options = next(iter(built().values())), ("--generations", str(kept))
    labels = [
        generation(row, "🗑️ Discarded", "Press it."),
        generation(row, "✅ Verified", "Press it.", id="generation/other/x"),
        generation(row, "✍️ Modified", BETTER, id="generation/third/x"),
    ]
    assert take(tmp_path, labels, options=options) == 0
    assert overrides(knowledge) == {}
    said = capsys.readouterr().out
    assert "3 labels of generations" in said and "1 of them are corrected answers" in said and "--fixes" in said
    assert sorted(map(json.loads, kept.read_text(encoding="utf-8").splitlines()), key=str) == sorted(labels, key=str)
    before = kept.read_bytes()
    assert take(tmp_path, labels, options=options) == 0 and kept.read_bytes() == before
    assert "nothing to change" in capsys.readouterr().out


def test_a_corrected_generation_of_a_training_row_replaces_its_answer_when_asked(knowledge, tmp_path, kept, capsys):
    row = next(r for r in built().values() if r["instruction"] == "How do I export?")
    label, options = generation(row, "✍️ Modified", BETTER), ("--generations", str(kept), "--fixes")
    assert take(tmp_path, [label], options=options) == 0
    assert built()[row["id"]] == row | {"response": BETTER}
    assert take(tmp_path, [label], options=options) == 0 and "nothing to change" in capsys.readouterr().out
    older = generation(row, "✍️ Modified", BETTER.replace("panel", "export panel"))  # made before the row was changed
    assert take(tmp_path, [older], options=options) == 2
    assert "other words than the corpus has now" in capsys.readouterr().err
    assert built()[row["id"]]["response"] == BETTER


@pytest.mark.parametrize("fields", [{"split": "test"}, {"split": None, "suite": "probes"}, {"source": None, "split": None}])  # fmt: skip
def test_held_out_rows_and_suite_items_never_enter_the_corpus(knowledge, tmp_path, kept, capsys, fields):
    row = next(r for r in built().values() if r["instruction"] == "How do I export?")
    labels = [generation(row, label, BETTER, **fields) for label in ("✍️ Modified", "🗑️ Discarded", "✅ Verified")]
    assert take(tmp_path, labels, options=("--generations", str(kept), "--fixes")) == 0
    assert overrides(knowledge) == {} and len(kept.read_text(encoding="utf-8").splitlines()) == 3
    assert "3 of them are of held-out rows or suite items: refused into the corpus" in capsys.readouterr().out


def test_a_discarded_row_with_other_words_and_no_id_discards_nothing(knowledge, tmp_path, capsys):
    """A tool that drops ids and source would make a wrong answer of the model look like a wrong row."""
    row = generation(next(iter(built().values())), "🗑️ Discarded", "Press it.")
    assert take(tmp_path, [{key: row[key] for key in ("messages", "review_metadata")}]) == 2
    assert "its words are not the corpus's" in capsys.readouterr().err and overrides(knowledge) == {}


# Conversations


def conversation(label: str = "✅ Verified", **fields) -> dict:
    messages = pair("How do I export?", 'Press "Start export".') + pair("And then?", "Wait for the download.")
    row = {"id": "chat-1", "messages": messages, "language": "en", "topic": "export", "fact_ids": ["export-start"]}
    return row | {"review_metadata": {"label": label, "timestamp": "2026-01-05"}} | fields


def test_a_conversation_is_added_once_and_trains_on_every_answer(knowledge, tmp_path, chatml):
    path = tmp_path / "conversations.jsonl"
    options = ("--conversations", str(path))
    assert (
        take(
            tmp_path,
            [conversation(), conversation(id=None) | {"messages": conversation()["messages"][:2] * 2}],
            options=options,
        )
        == 0
    )
    first = path.read_bytes()
    assert take(tmp_path, [conversation()], options=options) == 0 and path.read_bytes() == first
    examples, verdicts = arciva.load_examples(str(path))
    assert len(examples) == 2 and verdicts == {"verified": 2} and len({e.id for e in examples}) == 2
    example = next(e for e in examples if e.id == "chat-1")
    assert (example.language, example.topic, example.fact_ids) == ("en", "export", ["export-start"])
    encoded = arciva.encode(chatml, example.messages)
    learnt = chatml.decode([label for label in encoded.labels if label != arciva.IGNORE_INDEX])
    assert learnt == 'Press "Start export".<|im_end|>Wait for the download.<|im_end|>'
    assert overrides(knowledge) == {}


def test_a_discarded_conversation_stays_on_file_and_out_of_training(knowledge, tmp_path):
    path = tmp_path / "conversations.jsonl"
    options = ("--conversations", str(path))
    assert (
        take(
            tmp_path,
            [conversation(), conversation(id="chat-2", messages=pair("a", "b") + pair("c", "d"))],
            options=options,
        )
        == 0
    )
    back = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}["chat-1"]
    revision = labeling.revision_of([m["content"] for m in back["messages"]])
    assert take(tmp_path, [conversation("🗑️ Discarded", revision=revision)], options=options) == 0
    assert len(path.read_text().splitlines()) == 2
    assert [e.id for e in arciva.load_examples(str(path))[0]] == ["chat-2"]
    assert take(tmp_path, [conversation()], options=options) == 2, "an older file does not bring it back"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": pair("a", "b") + pair("c", "d")}, "chat-1 differs from what is stored"),
        ({"id": "chat-2", "fact_ids": ["nonsense"]}, "unknown fact ids ['nonsense']"),
        ({"id": "chat-2", "messages": [*pair("a", "b"), {"role": "user", "content": "c"}]}, "end with the assistant"),
        ({"id": "chat-2", "language": "fr"}, "language"),
    ],
)
def test_a_conversation_that_cannot_be_taken_is_reported(knowledge, tmp_path, capsys, change, words):
    path = tmp_path / "conversations.jsonl"
    assert take(tmp_path, [conversation()], options=("--conversations", str(path))) == 0
    before = path.read_bytes()
    assert take(tmp_path, [conversation(**change)], options=("--conversations", str(path))) == 2
    assert words in capsys.readouterr().err and path.read_bytes() == before


def test_several_turns_do_not_replace_a_corpus_row(knowledge, tmp_path, capsys):
    row = exported(tmp_path, "messages")["How do I export?"]
    reviewed = review(row | {"messages": row["messages"] * 2}, "✍️ Modified")
    assert take(tmp_path, [reviewed], options=("--conversations", str(tmp_path / "c.jsonl"))) == 2
    assert "has several turns" in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl").exists()


def test_conversations_leave_as_messages_only(tmp_path, capsys):
    path = write_rows(tmp_path / "conversations.jsonl", [conversation()])
    assert labeling.main(["export", str(path), "--format", "instruction"]) == 2
    assert "several turns" in capsys.readouterr().err
    assert labeling.main(["export", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["messages"] == conversation()["messages"]
