"""HellaSwag and LAMBADA: how a row becomes an item, and where rows come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.config import from_plain
from tasks.data import items
from tasks.data.items import Choice, LastWord, hellaswag_item, lambada_item, load_hellaswag, load_lambada
from tasks.data.specs import HubSpec, ItemSpec
from tasks.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("no_environment")
MakeFiles = Callable[[dict[str, str | bytes]], Path]
ENDINGS = ["falls.", "sits [step] down  there.", "sings."]
HIDDEN_HUB = HubSpec("Rowan/hellaswag", splits={"test": "validation"})


def row(**changes: object) -> dict:
    return {"activity_label": "Roof repair", "ctx_a": "A man sits on a roof.", "ctx_b": "the Old man", "label": "1",
            "endings": ENDINGS} | changes  # fmt: skip


def test_a_row_is_laid_out_as_in_lm_eval():
    """The expected texts are worked out by hand from process_docs and preprocess of lm-eval."""
    assert hellaswag_item(row(), "x") == Choice(
        "Roof repair: A man sits on a roof. The old man", ("falls.", "sits down there.", "sings."), 1
    )
    begun = "How to fly [title] Get  wings. [step] Buy them."
    wikihow = row(ctx_a=begun, ctx_b="", endings=[" [substeps] Shop. ", "b"])
    item = hellaswag_item(wikihow, "x")
    assert item.context == "Roof repair: How to fly. Get wings. Buy them."
    assert item.endings == (" Shop.", "b")


@pytest.mark.parametrize(
    ("joined", "context"),
    [
        ("A man sits on a roof. the Old man", "A man sits on a roof. The old man"),
        ('He says "go!" she', 'He says "go!" She'),
        ("Buy wings. Fly away.", "Buy wings. Fly away."),
        ("Buy wings. Fly", "Buy wings. Fly"),
        ("no sentence ends here", "no sentence ends here"),
        ("One. two. three", "One. two. Three"),
    ],
)
def test_a_begun_sentence_is_found_in_a_joined_context(joined, context):
    whole = {k: v for k, v in row(ctx=joined).items() if k not in ("ctx_a", "ctx_b")}
    assert hellaswag_item(whole, "x").context == f"Roof repair: {context}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 3}, "x: label is 3, allowed is 0 to 2"),
        ({"label": "-1"}, "x: label is '-1'"),
        ({"label": None}, "x: label is None"),
        ({"endings": "falls."}, "x: activity_label, ctx and endings must be texts"),
        ({"endings": ["a", 2]}, "x: activity_label, ctx and endings must be texts"),
        ({"endings": ["a", "[x]"]}, "x: an ending is empty"),
        ({"ctx_b": None}, "x: activity_label, ctx and endings must be texts"),
    ],
)
def test_a_wrong_row_is_named(changes, message):
    with pytest.raises(DataError) as caught:
        hellaswag_item(row(**changes), "x")
    assert str(caught.value).startswith(message)


def test_missing_columns_are_named():
    with pytest.raises(DataError, match="^x: no column activity_label, endings, label; present are ctx"):
        hellaswag_item({"ctx": "a"}, "x")
    without = row()
    del without["ctx_b"]
    with pytest.raises(DataError, match="^x: no column ctx;"):
        hellaswag_item(without, "x")


def test_the_last_word_is_cut_at_the_last_space():
    assert lambada_item({"text": 'One\n\n"Two,  three\nfour'}, "x") == LastWord('One\n\n"Two, ', " three\nfour")
    assert lambada_item({"text": "alone"}, "x") == LastWord("", " alone")
    for text in ("ends with a space ", ""):
        with pytest.raises(DataError, match="^x: the text has no last word"):
            lambada_item({"text": text}, "x")
    with pytest.raises(DataError, match="^x: text holds int"):
        lambada_item({"text": 3}, "x")


def test_local_files_are_read_in_order_up_to_the_most(make_files: MakeFiles):
    root = make_files({"eval/l/b.jsonl": '{"text": "c d"}\n', "eval/l/a.jsonl": '{"text": "a b"}\n{"text": "b c"}\n',
                       "eval/l/SOURCE.txt": "somewhere"})  # fmt: skip
    found = load_lambada(ItemSpec(("local",), local="eval/l"), root)
    assert [item.word for item in found.items] == [" b", " c", " d"]
    assert found.source == "local:eval/l"
    two = load_lambada(ItemSpec(("local",), local="eval/l", max_items=2), root)
    assert two.items == found.items[:2]
    assert two.fingerprint != found.fingerprint == load_lambada(ItemSpec(("local",), local="eval/l"), root).fingerprint


def test_wrong_files_are_named(make_files: MakeFiles):
    spec = ItemSpec(("local",), local="eval/l")
    with pytest.raises(DataError, match="^local: no .jsonl files in "):
        load_lambada(spec, make_files({"eval/l/a.txt": "a b"}))
    with pytest.raises(DataError, match="^sources: local:eval/l holds no items"):
        load_lambada(spec, make_files({"eval/l/a.jsonl": "\n"}))
    with pytest.raises(DataError, match="^local:eval/l: item 1: the text has no last word"):
        load_lambada(spec, make_files({"eval/l/a.jsonl": '{"text": "a b"}\n{"text": ""}\n'}))
    with pytest.raises(DataError, match="^sources: none of local can serve: local: no folder eval/other below"):
        load_lambada(ItemSpec(("local",), local="eval/other"), make_files({}))


def test_the_hub_serves_where_there_is_no_folder(monkeypatch: pytest.MonkeyPatch, make_files: MakeFiles):
    asked = []

    class Hub:
        def __init__(self, spec: HubSpec) -> None:
            asked.append(spec)

        def rows(self, split: str):
            asked.append(split)
            return iter([row(), row(label="2")])

    monkeypatch.setattr(items, "HubText", Hub)
    spec = ItemSpec(("local", "hub"), local="eval/hellaswag", hub=HIDDEN_HUB)
    found = load_hellaswag(spec, make_files({}))
    assert asked == [HIDDEN_HUB, "test"]
    assert (found.source, [i.label for i in found.items]) == ("hub:Rowan/hellaswag", [1, 2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ["embedded"]}, "x.yaml: sources: got 'embedded', allowed are local, hub"),
        ({"sources": ["local"]}, "x.yaml: local: missing"),
        ({"sources": ["hub"]}, "x.yaml: hub: missing"),
        ({"sources": ["hub"], "hub": {"path": "a/b"}}, "x.yaml: hub.splits: names no split for test"),
        ({"sources": ["local"], "local": "a", "max_items": 0}, "x.yaml: max_items: got 0"),
        ({"sources": []}, "x.yaml: sources: empty"),
    ],
)
def test_a_wrong_spec_is_named(values, message):
    with pytest.raises(ConfigError) as caught:
        from_plain(ItemSpec, values, "x.yaml")
    assert str(caught.value).startswith(message)


@pytest.mark.realdata
def test_real_items(data_root: Path):
    for name in ("hellaswag", "lambada"):
        if not (data_root / "eval" / name).is_dir():
            pytest.skip(f"no eval/{name} in the data folder")
    hellaswag = load_hellaswag(ItemSpec(("local",), local="eval/hellaswag"), data_root).items
    assert len(hellaswag) == 10_042 and {len(item.endings) for item in hellaswag} == {4}
    assert hellaswag[0].context == "Roof shingle removal: A man is sitting on a roof. He"
    lambada = load_lambada(ItemSpec(("local",), local="eval/lambada"), data_root).items
    assert len(lambada) == 5_153
    assert lambada[0].word == " signs" and lambada[0].context.endswith("I don't care about")
    assert json.dumps(lambada[0].context)
