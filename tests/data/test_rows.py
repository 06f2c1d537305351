"""Rows: four formats give one frame, a bad file gets one sentence, and no question is in both parts of the split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from utils.config import load_config
from utils.data import hub
from utils.data.hub import find_commits
from utils.data.rows import check_rows, load_rows, read_benchmark, read_chats, read_table, write_frame, write_split
from utils.data.split import split_rows
from utils.errors import DataError
from utils.schema import Config

ROWS = [
    {"Question": 'A man, aged 45, says "ow".\nWhat\'s wrong?', "Complex_CoT": "Okay, so…\n\nHmm.", "Response": "Gout."},
    {"Question": "一名女性患者出现发热。诊断是什么？", "Complex_CoT": "🩺 → مريض", "Response": "Line\u2028separator"},
    {"Question": "Which drug is contraindicated?", "Complex_CoT": "There is nothing against any.", "Response": "None"},
    {"Question": "Is 007 a dose?", "Complex_CoT": "NA", "Response": "12"},
]
WRITERS = {
    ".jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True, force_ascii=False),
    ".json": lambda frame, path: frame.to_json(path, orient="records", force_ascii=False),
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int) -> list[dict]:
    return [
        {"Question": f"Question {i}?", "Complex_CoT": f"Thought {i}.", "Response": f"Answer {i}."} for i in range(count)
    ]


def local(path: Path, **data) -> Config:
    """The demo profile on a local file."""
    return load_config("demo", {"data.path": str(path), **{f"data.{key}": value for key, value in data.items()}})


def refusal(path: Path) -> str:
    """The sentence that reading and checking this file ends in."""
    with pytest.raises(DataError) as caught:
        check_rows(read_table(path), path.name)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and path.name in message
    return message


@pytest.mark.parametrize("suffix", list(WRITERS))
@pytest.mark.parametrize("row", range(len(ROWS)), ids=["quotes", "scripts", "None", "NA"])
def test_every_format_gives_the_text_that_was_written(tmp_path, suffix, row):
    WRITERS[suffix](pd.DataFrame(ROWS[row : row + 1]), tmp_path / f"rows{suffix}")
    frame = check_rows(read_table(tmp_path / f"rows{suffix}"), "rows")
    assert frame.drop(columns="id").to_dict("records") == ROWS[row : row + 1]


def test_the_same_rows_get_the_same_ids_in_every_format(tmp_path):
    frames = []
    for suffix, write in WRITERS.items():
        write(pd.DataFrame(numbered(5)), tmp_path / f"rows{suffix}")
        frames.append(check_rows(read_table(tmp_path / f"rows{suffix}"), "rows"))
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], check_dtype=False)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](pd.DataFrame(numbered(2)), path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert check_rows(read_table(path), "rows")["Question"].tolist() == ["Question 0?", "Question 1?"]


def test_a_raw_line_separator_inside_a_jsonl_string_breaks_no_row(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[1:2])
    assert "\u2028" in path.read_text(encoding="utf-8")
    assert read_table(path)["Response"].tolist() == ["Line\u2028separator"]


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    assert refusal(tmp_path / "rows.jsonl").startswith(
        f"There is no data file {tmp_path / 'rows.jsonl'}; check data.path"
    )
    (tmp_path / "folder.jsonl").mkdir()
    assert "There is no data file" in refusal(tmp_path / "folder.jsonl")


@pytest.mark.parametrize(("name", "found"), [("rows.xlsx", ".xlsx"), ("rows", "nothing")])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name, found):
    (tmp_path / name).write_text("x")
    assert refusal(tmp_path / name) == f"{name} ends in {found}; expected one of .jsonl, .json, .csv, .parquet."


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_an_empty_file_is_refused(tmp_path, suffix):
    (tmp_path / f"rows{suffix}").write_text("")
    assert refusal(tmp_path / f"rows{suffix}").startswith(f"rows{suffix} is empty; expected rows with Question,")


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "Question,Complex_CoT,Response\n")]
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "holds no rows" in refusal(tmp_path / name)


def test_a_broken_line_of_jsonl_is_refused_by_its_number(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(3))
    path.write_text(path.read_text() + '{"Question": "torn\n')
    assert refusal(path) == "rows.jsonl is not JSONL: line 4 is no JSON object. Mend or rename it."
    path.write_text('[1, 2]\n"text"\n')
    assert "line 1 is no JSON object" in refusal(path)


@pytest.mark.parametrize(("truth", "claim"), [(a, b) for a in WRITERS for b in WRITERS if a != b])
def test_a_file_of_another_format_than_its_name_says_is_refused(tmp_path, truth, claim):
    path = tmp_path / f"rows{claim}"
    WRITERS[truth](pd.DataFrame(numbered(3)), path)
    assert len(refusal(path)) < 300


@pytest.mark.parametrize("claim", [".jsonl", ".json", ".parquet"])
def test_a_csv_under_another_name_is_told_so(tmp_path, claim):
    WRITERS[".csv"](pd.DataFrame(numbered(3)), tmp_path / f"rows{claim}")
    assert f"rows{claim} is not {claim[1:].upper()}: " in refusal(tmp_path / f"rows{claim}")


def test_a_parquet_file_is_read_once_and_its_folders_name_is_no_column(tmp_path, monkeypatch):
    import pyarrow.parquet

    (tmp_path / "lang=en").mkdir()
    path = tmp_path / "lang=en" / "rows.parquet"
    WRITERS[".parquet"](pd.DataFrame(ROWS), path)
    real, reads = pyarrow.parquet.read_table, []
    monkeypatch.setattr(pyarrow.parquet, "read_table", lambda *a, **k: reads.append(a) or real(*a, **k))
    frame = read_table(path)
    assert len(reads) == 1 and frame.to_dict("records") == ROWS
    pd.testing.assert_frame_equal(frame, pd.read_parquet(path))


def test_a_json_file_of_one_object_is_told_that_a_list_is_expected(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[0]))
    assert "list" in refusal(tmp_path / "rows.json")


def test_text_in_another_encoding_is_refused(tmp_path):
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        (tmp_path / name).write_bytes("Question,Complex_CoT,Response\nWas fehlt dem Müden?,a,b\n".encode("latin-1"))
        assert f"{name} is not" in refusal(tmp_path / name)


def test_a_csv_with_unquoted_commas_is_refused_and_its_columns_do_not_shift(tmp_path):
    """pandas takes a surplus first cell for an index: every text would move one column to the left, unseen."""
    path = tmp_path / "rows.csv"
    path.write_text("Question,Complex_CoT,Response\nA man, aged 45?,Hmm.,Gout.\nA woman, aged 50?,Hmm.,Flu.\n")
    refusal(path)


def test_a_missing_column_is_refused_with_those_that_are_there(tmp_path):
    rows = [{"Question": "a", "cot": "b", "Response": "c"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert refusal(path).startswith("rows.jsonl lacks the column(s) Complex_CoT; it has Question, cot, Response. Name")


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        ("", "is empty, and data.reasoning is required"),
        (" \n\u00a0", "is empty"),
        (None, "is empty"),
        (float("nan"), "is empty"),
        (7, "holds a int, expected text"),
        (["a"], "holds a list, expected text"),
        ({"a": 1}, "holds a dict, expected text"),
        ("a</think>b", "holds a <think> or </think> that is not one closed block"),
    ],
)
def test_an_empty_or_non_string_cell_is_refused_by_row_and_column(tmp_path, cell, what):
    rows = numbered(3)
    rows[1]["Complex_CoT"] = cell
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert refusal(path).startswith(f"rows.jsonl, row 2: Complex_CoT {what}")


def test_an_empty_cell_of_a_csv_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("Question,Complex_CoT,Response\na,b,c\na,,c\n")
    assert "row 2: Complex_CoT is empty" in refusal(tmp_path / "rows.csv")


def test_a_group_is_kept_white_space_and_columns_that_nobody_reads_are_not(tmp_path):
    text = {"Question": " a\n", "Complex_CoT": "b", "Response": "c", "group": "g"}
    odd = [{"score": 3, "metadata": {}, "size": 10**30}, {"score": "n/a", "metadata": {}, "size": 1}]
    path = write_jsonl(tmp_path / "rows.jsonl", [text | more for more in odd])
    rows = check_rows(read_table(path), "rows")
    write_frame(tmp_path / "rows.parquet", rows)
    assert list(rows.columns) == ["Question", "Complex_CoT", "Response", "group", "id"]
    row = rows.iloc[0]
    assert (row["Question"], row["group"], len(row["id"])) == ("a", "g", 12)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_what_a_rule_can_check_is_one_of_a_list_of_texts_and_anything_else_is_none(tmp_path, suffix):
    choices = ["gout", "lupus"]
    pairs = [("gout", choices), ("B", choices), ("gout", {"A": "gout"}), ("gout", "gout, lupus"), (None, None)]
    if suffix == ".csv":
        pairs = [(answer, json.dumps(cell) if isinstance(cell, list) else cell) for answer, cell in pairs]
    if suffix == ".parquet":  # which has one type for a column
        pairs = [(answer, cell if isinstance(cell, list) else None) for answer, cell in pairs]
    rows = [{"Question": f"q{i}", "Complex_CoT": "b", "Response": "c", "answer": answer, "choices": cell}
            for i, (answer, cell) in enumerate(pairs)]  # fmt: skip
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        frame = pd.DataFrame(rows)
        frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    found = check_rows(read_table(path), "rows")
    assert list(found["choices"]) == [choices, None, None, None, None]
    assert found["answer"].iloc[0] == "gout" and found["answer"].iloc[1:].isna().all()
    text = {"Question": "q", "Complex_CoT": "b", "Response": "c"}
    alone = check_rows(pd.DataFrame([text | {"answer": 3}, text | {"answer": "n/a"}]), "rows")
    assert "answer" not in alone  # without choices nothing can be checked
    several = check_rows(pd.DataFrame([text | {"answer": np.array(["a", "b"]), "choices": ["a"]}]), "rows")
    assert several["answer"].isna().all()


def test_accuracy_by_rule_is_refused_where_a_held_out_row_cannot_be_checked(tmp_path):
    rows = [row | {"answer": "A", "choices": ["gout", "lupus"]} for row in numbered(6)]
    config = local(write_jsonl(tmp_path / "rows.jsonl", rows), eval_rows=2)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"primary": "accuracy"})})
    with pytest.raises(
        DataError, match="not all held-out rows have choices, a list of texts, and an answer among them"
    ):
        split_rows(config)


def test_a_written_split_is_read_back_as_it_was(tmp_path):
    train, _, held_out, report = split_rows(local(write_jsonl(tmp_path / "rows.jsonl", numbered(6)), eval_rows=2))
    assert report["source"] == "rows.jsonl"  # cards are published: no path of this machine
    items = pd.DataFrame([{"id": "007", "question": "医\u2028/?", "options": {"A": "a", "B": "b"}, "gold": "B"}])
    write_split(tmp_path, {"train": train, "eval": held_out}, items, report)
    assert pd.read_parquet(tmp_path / "train.parquet").to_dict("records") == train.to_dict("records")
    assert pd.read_parquet(tmp_path / "eval.parquet").to_dict("records") == held_out.to_dict("records")
    assert read_benchmark(tmp_path).to_dict("records") == items.to_dict("records")
    assert json.loads((tmp_path / "split.json").read_text()) == report
    write_split(tmp_path, {"train": train, "eval": held_out}, None, report)
    assert read_benchmark(tmp_path) is None


def test_every_hub_benchmark_gets_a_commit_and_the_list_is_pinned_whole(monkeypatch):
    monkeypatch.setattr(hub, "ask_hub", lambda kind, name: {"sha": f"head of {name}"})
    found = find_commits(load_config("full"))
    assert found["evaluate.benchmark.revision"] == "head of GBaker/MedQA-USMLE-4-options"
    pinned = load_config("full", found).evaluate
    assert [s.revision for s in pinned.more_benchmarks] == [f"head of {s.name}" for s in pinned.more_benchmarks]
    assert find_commits(load_config("full", found)) == {} == find_commits(load_config("demo"))


def test_where_the_hub_is_out_of_reach_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(hub, "ask_hub", lambda kind, name: 1 / 0)
    assert find_commits(load_config("full")) == {}


def test_a_commit_that_cannot_be_found_costs_none_of_the_others(monkeypatch):
    def head(kind: str, name: str) -> dict[str, str]:
        if name == "openlifescienceai/medmcqa":
            raise ConnectionError("reset by peer")
        return {"sha": f"head of {name}"}

    monkeypatch.setattr(hub, "ask_hub", head)
    found = find_commits(load_config("full"))
    assert found["evaluate.benchmark.revision"] == "head of GBaker/MedQA-USMLE-4-options"
    assert [s["revision"] for s in found["evaluate.more_benchmarks"]] == [None, "head of qiaojin/PubMedQA"]


def test_the_tutorials_question_is_a_file_of_its_own_and_empty_where_there_is_none(tmp_path):
    train, _, held_out, report = split_rows(local(write_jsonl(tmp_path / "rows.jsonl", numbered(6)), eval_rows=2))
    write_split(tmp_path, {"train": train, "eval": held_out}, None, report)
    assert json.loads((tmp_path / "anecdote.json").read_text()) == {}
    write_split(
        tmp_path,
        {"train": train, "eval": held_out},
        None,
        report | {"tutorial_question": {"id": "x", "question": "医?"}},
    )
    assert json.loads((tmp_path / "anecdote.json").read_text(encoding="utf-8")) == {"id": "x", "question": "医?"}


CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>\nHmm.\n</think>\n\nSo."}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "<think>Hmm.</think>So."}]
ONE_ROW = {"Question": "Why?", "Complex_CoT": "Hmm.", "Response": "So."}
FORMS = {
    "columns": ({"prompt": "Why?", "reasoning": "Hmm.", "answer": " So."},
                {"columns": {"Question": "prompt", "Complex_CoT": "reasoning", "Response": "answer"}}),
    "swapped": ({"Response": "Why?", "Question": "So.", "Complex_CoT": "Hmm."},
                {"columns": {"Question": "Response", "Response": "Question"}}),
    "block": ({"Question": "Why?", "Response": "<think>Hmm.</think>So."}, {}),
    "messages": ({"messages": CHAT}, {}),
    "conversations": ({"conversations": SHAREGPT}, {}),
    "renamed chat": ({"dialog": CHAT}, {"columns": {"messages": "dialog"}}),
    "chat as text": ({"messages": json.dumps(CHAT)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_in_the_readers_own_form_are_the_same_rows(tmp_path, form, suffix):
    row, settings = FORMS[form]
    WRITERS[suffix](pd.DataFrame([row]), tmp_path / f"rows{suffix}")
    rows, dropped = load_rows(local(tmp_path / f"rows{suffix}", **settings).data)
    assert rows[list(ONE_ROW)].to_dict("records") == [ONE_ROW] and dropped == []
    assert set(rows.columns) <= {*ONE_ROW, "id", "row", "answer"}


def test_rows_without_reasoning_are_read_where_the_reader_says_so(tmp_path):
    for row in ({"Question": "Why?", "Response": "So."}, {"messages": [CHAT[0], CHAT[1] | {"content": "So."}]},
                {**ONE_ROW, "Complex_CoT": None}):  # fmt: skip
        path = write_jsonl(tmp_path / "rows.jsonl", [row])
        rows, _ = load_rows(local(path, reasoning="optional").data)
        assert rows[list(ONE_ROW)].to_dict("records") == [ONE_ROW | {"Complex_CoT": ""}]
        with pytest.raises(DataError, match=r"data\.reasoning"):
            load_rows(local(path).data)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (CHAT * 2, "has the turns user, assistant, user, assistant, expected one of user and assistant"),
        (CHAT[:1], "has the turns user, expected"),
        ([], "has the turns of nobody, expected"),
        ("Why?", "is no list of messages"),
        ({"role": "user"}, "is no list of messages"),
        ([CHAT[0], {"role": "assistant", "content": "<think>Hm"}], "holds a <think> or </think> that is not one closed"),
        ([CHAT[0], {"role": "assistant", "content": None}], "Response is empty"),
    ],
)  # fmt: skip
def test_a_chat_of_another_shape_is_refused_in_a_file_and_dropped_from_the_hub(tmp_path, monkeypatch, chat, reason):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}, {"messages": chat}])
    with pytest.raises(DataError, match=f"rows.jsonl, row 2: .*{reason}"):
        load_rows(local(path).data)
    monkeypatch.setattr("utils.data.rows.load_hub_table", lambda *_: read_table(path))
    rows, dropped = load_rows(load_config("demo", {"data.name": "someone/rows"}).data)
    assert rows["row"].tolist() == [1] and [entry["row"] for entry in dropped] == [2] and reason in dropped[0]["reason"]


def test_one_system_message_is_left_out_and_said_and_several_are_refused(tmp_path, capsys):
    chats = [[{"role": "system", "content": said}, *CHAT] for said in ("Be kind.", "Be kind.", "Be brief.")]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats[:2]])
    assert load_rows(local(path).data)[0]["Question"].tolist() == ["Why?", "Why?"]
    assert "the system message 'Be kind.' is left out" in capsys.readouterr().out
    write_jsonl(path, [{"messages": chat} for chat in chats])
    with pytest.raises(DataError, match="has 2 different system messages in messages, expected none or one for all"):
        load_rows(local(path).data)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "Why?", "Response": "So."}])
    with pytest.raises(
        DataError, match=r"has no column 'prompt', which data.columns.Question names; it has q, Response"
    ):
        load_rows(local(path, columns={"Question": "prompt"}).data)


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "system", "content": [{"type": "text", "text": "x"}]}, {"role": "user", "content": "q"},
         {"role": "assistant", "content": "a"}],
        [{"role": ["user"], "content": "q"}, {"role": "assistant", "content": "a"}],
    ],
)  # fmt: skip
def test_a_role_or_a_system_message_that_is_no_text_is_a_problem_of_its_row(chat):
    _, problems = read_chats(pd.DataFrame({"messages": [chat]}), "messages", "rows.jsonl")
    assert list(problems) == [0] and ("no text" in problems[0] or "expected one of user and assistant" in problems[0])
