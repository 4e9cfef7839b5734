"""records: JSON lines, one array, tables; whatever is wrong is said with its line."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import InputError, records


@pytest.fixture
def read(tmp_path):
    """read(content, name) → what the records are, errors as their text."""

    def read(content: str | bytes, name: str = "file.csv") -> list:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return [(line, f"error: {record}" if isinstance(record, InputError) else record) for line, record in records.read(path)]

    return read


ROWS = [{"prompt": "a, b", "completion": 'say "x"'}, {"prompt": "two\nlines", "completion": "你好；🙂"}, {"prompt": "", "completion": "\ttab"}]


@pytest.mark.parametrize("sign", [",", ";", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_what_a_spreadsheet_writes_comes_back(read, sign, quoting, newline, bom):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=sign, quoting=quoting, lineterminator=newline)
    writer.writeheader()
    writer.writerows(ROWS)
    found = read(bom + text.getvalue())
    assert [record for _, record in found] == ROWS
    assert [line for line, _ in found] == [2, 3, 5]


def test_in_a_table_of_tabs_a_lone_quote_is_text(read):
    found = read('prompt\tcompletion\n"Hi\tHello"\n5" disks\t"quoted" word\n\n"all"\tx\n', "file.tsv")
    assert [r["prompt"] + "|" + r["completion"] for _, r in found] == ['"Hi|Hello"', '5" disks|"quoted" word', '"all"|x']
    assert [line for line, _ in found] == [2, 3, 5]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_quoted_table_of_tabs_loses_its_quotes(read, quoting):
    rows = [["prompt", "completion"], ['say "x"', "5\" disks"], ['"', "a, b"]]
    text = io.StringIO()
    csv.writer(text, delimiter="\t", quoting=quoting).writerows(rows)
    assert [list(record.values()) for _, record in read(text.getvalue(), "file.tsv")] == rows[1:]


@pytest.mark.parametrize("inside", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("sign", [",", "\t"])
def test_only_line_breaks_end_a_row(read, inside, sign):
    """Not the other characters at which Python's splitlines parts a text."""
    found = read(f'prompt{sign}completion\nHi{inside}there{sign}"Hel{inside}lo,\tyou"\n')
    assert found == [(2, {"prompt": f"Hi{inside}there", "completion": f"Hel{inside}lo,\tyou"})]


@pytest.mark.parametrize("header, first", [
    ("a,b;c,d", ["a", "b;c", "d"]), ("a;b,c;d", ["a", "b,c", "d"]), ("a,b,c\td", ["a,b,c", "d"]), (" a , b ", ["a", "b"]), ("a,b;c", ["a", "b;c"]),
])
def test_the_first_line_tells_what_parts_the_columns(read, header, first):
    [(_, record)] = read(f"{header}\n{header}")
    assert list(record) == first


def test_a_row_of_another_length_is_told_and_the_next_one_read(read):
    found = read("prompt,completion\na,b,c\nd\n,\ne,f\n")
    assert found[0] == (2, "error: 3 fields, the first line names 2 columns: prompt, completion")
    assert found[1][0] == 3 and found[2] == (5, {"prompt": "e", "completion": "f"})
    assert len(found) == 3  # a row of empty fields is none


@pytest.mark.parametrize("line", ['3,"4', '3,"4" 5'], ids=["never closed", "text after"])
def test_a_wrong_quote_is_refused_with_its_line_where_other_quotes_matter(read, line):
    """The rows after it cannot be told from text in quotes: to leave them out would lose most of the file."""
    with pytest.raises(InputError, match=r"file.csv, line 3: a quote that is not closed, or has text beside it"):
        read(f'a,b\n1,"2, too"\n{line}\n5,6\n')
    assert read(f"a,b\n1,2\n{line}\n5,6\n") == [(2, {"a": "1", "b": "2"}), (3, {"a": "3", "b": line[2:]}), (4, {"a": "5", "b": "6"})]


def test_a_spreadsheet_is_told_from_text(tmp_path):
    (tmp_path / "talk.xlsx").write_bytes(b"PK\x03\x04\x14\x00")
    with pytest.raises(InputError, match="talk.xlsx: a spreadsheet or an archive, not text; save it as CSV"):
        list(records.read(tmp_path / "talk.xlsx"))


@pytest.mark.parametrize("header", ["a,a", "a,", ",", " a ,a", "a\ta"])
def test_columns_need_names_of_their_own(read, header):
    if header == ",":
        assert read(f"{header}\n") == []
        return
    with pytest.raises(InputError, match=r"file.csv, line 2: columns are .*: each needs a name of its own, in the first line"):
        read(f"\n{header}\n1,2\n")


def test_a_header_alone_has_no_records(read):
    assert read("prompt,completion\n") == read("prompt,completion") == read("") == read("\n\n") == []


def test_what_a_file_is_is_told_by_its_first_sign(read):
    lines = '{"a": 1}\n\n{"a": 2}\n'
    assert read(lines, "x.csv") == read(lines, "x.txt") == read(lines) == [(1, {"a": 1}), (3, {"a": 2})]
    assert read(' [{"a": 1},\n 7, null]', "x.txt") == [(1, {"a": 1}), (2, 7), (3, None)]
    assert read('{\n "a": 1\n}', "x.json") == [(1, {"a": 1})]
    assert read("plain words", "x.jsonl")[0][1].startswith("error: not JSON")


def test_one_broken_line_costs_no_other(read):
    found = read('{"a": 1}\n{"a": \n{"a": 2}\n')
    assert [found[0], found[2]] == [(1, {"a": 1}), (3, {"a": 2})] and found[1][0] == 2 and "not JSON: Expecting value" in found[1][1]
    assert read('[{"a": 1},\n{"a": }]')[0][0] == 2


@pytest.mark.parametrize("content, said", [
    ("你好,世界\n".encode("gbk"), "line 1: not UTF-8 at byte 0; convert it, e.g. iconv -f gbk"),
    ("a,b\n1,2".encode("utf-16"), "not UTF-8 at byte 0; convert it, e.g. iconv -f utf-16"),
    (b"a,b\n1,\x002", "line 2: has zero bytes"),
])
def test_another_encoding_is_told(read, content, said):
    with pytest.raises(InputError, match=f"file.csv, {said}" if said.startswith("line") else said):
        read(content)


def test_names_that_differ_in_case_alone_are_refused():
    assert records.named({" Prompt ": 1, "标签": 2, 7: 3}) == {"prompt": 1, "标签": 2, "7": 3}
    with pytest.raises(InputError, match="keys are Prompt, prompt: two of them differ in nothing but case"):
        records.named({"Prompt": 1, "prompt": 2})


def test_names_out_of_a_file_are_shown_in_one_short_line():
    assert records.shown(["a\n b", "c" * 40]) == "a b, " + "c" * 30
    assert records.shown(list(range(10))) == "0, 1, 2, 3, 4, 5, 6, 7, … (10 in all)"


FIELD = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=6)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(FIELD, FIELD), max_size=5), sign=st.sampled_from(",;\t"))
def test_any_quoted_table_comes_back(tmp_path_factory, rows, sign):
    text = io.StringIO()
    csv.writer(text, delimiter=sign, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows([("one", "two"), *rows])
    path = tmp_path_factory.mktemp("table") / "x.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    found = [tuple(record.values()) for _, record in records.read(path)]
    kept = [row for row in rows if any(field.strip() for field in row)]
    assert found == kept


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet='{}[]",:;\t\n ab你1\\', max_size=30))
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "x.csv"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        for line, record in records.read(path):
            assert 1 <= line <= text.count("\n") + 2
            json.dumps(str(record))
    except InputError as error:
        assert "\n" not in str(error)
