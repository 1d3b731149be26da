from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tasks.claim import Claim
from tasks.config import SCALES, find_experiments, load_experiment
from tasks.errors import ConfigError
from tasks.schema import from_plain


def drop(*path):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


def put(*path):
    """put("a", "b", value) sets config["a"]["b"]."""

    def change(config):
        for key in path[:-2]:
            config = config[key]
        config[path[-2]] = path[-1]

    return change


def claim(**changes):
    """Give the config a claim, valid but for the changes."""
    def change(config):
        config["render"]["table"]["columns"] = ["metric", "n"]
        config["claims"] = [{"text": "twice as good", "kind": "ratio", "metric": "val_loss", "of": "a", "over": "b_1.5",
                             "paper": 2, **changes}]

    return change


def message_of(path: Path, root: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, root or path.parents[1])
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_valid_config_loads_whole(write_config):
    path = write_config()
    experiment = load_experiment(path, path.parents[1])
    assert (experiment.id, experiment.paper, experiment.path) == ("adasplash/fake", "AdaSplash", path)
    assert experiment.systems == {"a": "System A", "b_1.5": "System B"}
    assert experiment.notes == ("nothing is known",)
    assert experiment.render.table.metrics == ("val_loss",) and experiment.render.figure is None
    assert list(experiment.reported.cells()) == [
        {"system": "a", "metric": "val_loss", "params": {"n": 8}, "value": 3.0, "status": "ok"},
        {"system": "b_1.5", "metric": "val_loss", "params": {"n": 8}, "value": None, "status": "oom"},
    ]


def test_claims_load(write_config):
    path = write_config(change=claim(where={"n": 8}))
    assert load_experiment(path, path.parents[1]).claims == (
        Claim("twice as good", "ratio", "val_loss", "a", 2.0, over="b_1.5", where={"n": 8}),)
    path = write_config(change=claim(kind="crossing", over="", along="n"))
    assert load_experiment(path, path.parents[1]).claims[0].along == "n"
    path = write_config(change=claim(kind="most", over="", paper=None, target=0))
    assert load_experiment(path, path.parents[1]).claims[0].target == 0
    path = write_config()
    assert load_experiment(path, path.parents[1]).claims == ()


MISTAKES = [
    (put("titel", "x"), r"titel: unknown key, allowed are experiment, paper, "),
    (drop("title"), r"title: missing, expected a string"),
    (drop("systems"), r"systems: missing, expected a mapping"),
    (drop("render"), r"render: missing, expected a mapping"),
    (drop("reported"), r"reported: missing, expected a mapping with the keys source, columns, rows or null"),
    (put("title", 3), r"title: got 3 \(int\), allowed is a string"),
    (put("title", None), r"title: got nothing, allowed is a string"),
    (put("title", True), r"title: got True \(bool\), allowed is a string"),
    (put("paper", "AdaSplash-3"), r"paper: got 'AdaSplash-3', allowed are AdaSplash, AdaSplash-2"),
    (put("family", "vision"), r"family: got 'vision', allowed are kernel_bench, .*helmet"),
    (put("experiment", "adasplash/other"), r"experiment: got 'adasplash/other', its place .* 'adasplash/fake'"),
    (put("experiment", "../../elsewhere"), r"experiment: got '../../elsewhere', allowed is folder/name"),
    (put("notes", "one sentence"), r"notes: got 'one sentence' \(str\), allowed is a list of a string"),
    (put("notes", ["a", 1]), r"notes\[1\]: got 1 \(int\), allowed is a string"),
    (put("systems", ["a"]), r"systems: got \['a'\] \(list\), allowed is a mapping to a string"),
    (put("systems", 1, "One"), r"systems.1: the key is 1 \(int\), write it in quotes"),
    (put("systems", "a", {}), r"systems.a: got {} \(dict\), allowed is a string"),
    (put("common", None), r"common: got nothing, allowed is a mapping"),
    (put("common", [1]), r"common: got \[1\] \(list\), allowed is a mapping"),
    (drop("scales", "lab"), r"scales.lab: missing, expected a mapping"),
    (put("scales", "huge", {}), r"scales.huge: unknown key, allowed are smoke, lab, paper"),
    (put("scales", "lab", [1]), r"scales.lab: got \[1\] \(list\), allowed is a mapping"),
    (put("render", {}), r"render.table: missing, and figure too"),
    (put("render", "tabel", {}), r"render.tabel: unknown key, allowed are table, figure"),
    (drop("render", "table", "rows"), r"render.table.rows: missing, expected a list of a string"),
    (put("render", "figure", {"kind": "pie", "x": "n", "y": "val_loss"}),
     r"render.figure.kind: got 'pie', allowed are lines, heatmap, bars"),
    (put("reported", "columns", ["system", "metric", "n"]), r"reported.columns: must hold .*; lacks value"),
    (put("reported", "columns", ["system", "metric", "metric", "value"]), r"reported.columns: got .* distinct"),
    (put("reported", "rows", 0, ["a", "val_loss", 3]), r"reported.rows\[0\]: has 3 fields, columns names 4"),
    (put("reported", "rows", 1, 3, "3.1"), r"reported.rows\[1\]: value is '3.1', allowed is a number or oom"),
    (put("reported", "rows", 1, 3, True), r"reported.rows\[1\]: value is True, allowed is a number or oom"),
    (put("reported", "rows", 1, 3, float("nan")), r"reported.rows\[1\]: value is nan, allowed is a number or oom"),
    (put("reported", "rows", 1, 0, "c"), r"reported.rows\[1\]: system 'c' is not among systems: a, b_1.5"),
    (put("reported", "rows", 1, 0, ["a"]), r"reported.rows\[1\]: system is \['a'\], allowed is a string"),
    (put("reported", "rows", 1, 1, None), r"reported.rows\[1\]: metric is None, allowed is a string"),
    (put("claims", "7-fold"), r"claims: got '7-fold' \(str\), allowed is a list of a mapping with the keys text, "),
    (claim(sort="ratio"), r"claims\[0\].sort: unknown key, allowed are text, kind, metric, of, paper, "),
    (claim(text=None), r"claims\[0\].text: got nothing, allowed is a string"),
    (claim(kind="sum"), r"claims\[0\].kind: got 'sum', allowed are ratio, crossing"),
    (claim(paper="7"), r"claims\[0\].paper: got '7' \(str\), allowed is a number"),
    (claim(paper=0), r"claims\[0\].paper: got 0, allowed is a number above 0"),
    (claim(paper=None), r"claims\[0\].paper: missing, expected a number \(or target, "),
    (claim(target=2), r"claims\[0\].target: got 2 beside paper, allowed is one of the two"),
    (claim(paper=None, target=0), r"claims\[0\].target: got 0, allowed is a number above 0 \(with kind most, 0 too\)"),
    (claim(kind="crossing", along="n", paper=None, target=2),
     r"claims\[0\].target: got 2, which goes with kinds ratio, exponent, most"),
    (claim(kind="most", over=""), r"claims\[0\].paper: got 2, which goes with kinds ratio and crossing; give target"),
    (claim(kind="most"), r"claims\[0\].over: got 'b_1.5', which goes with kinds ratio and crossing"),
    (claim(kind="exponent", over="", paper=None, target=2),
     r"claims\[0\].along: missing, the exponent is along a parameter or metric"),
    (claim(over=""), r"claims\[0\].over: missing, a ratio is of one system over another"),
    (claim(along="n"), r"claims\[0\].along: got 'n', which goes with kinds crossing and exponent"),
    (claim(kind="crossing"), r"claims\[0\].along: missing, the crossing is along a parameter or metric"),
    (claim(kind="crossing", along="m"), r"claims\[0\].along: got 'm', allowed is what render names: n, val_loss"),
    (claim(metric="loss"), r"claims\[0\].metric: got 'loss', allowed is what render names: val_loss"),
    (claim(of="c"), r"claims\[0\].of: system 'c' is not among systems: a, b_1.5"),
    (claim(over="c"), r"claims\[0\].over: system 'c' is not among systems: a, b_1.5"),
    (claim(where={"m": 1}), r"claims\[0\].where.m: unknown, allowed are the parameters that render names: n"),
    (claim(where={"n": [1]}), r"claims\[0\].where.n: got \[1\], allowed is a string, a number, or true or false"),
    (put("base", "adasplash/none"), r"base: no experiment 'adasplash/none' among the configs"),
    (put("base", "adasplash/fake"), r"base: an experiment cannot be its own base"),
]


@pytest.mark.parametrize(("change", "expected"), MISTAKES, ids=[expected.split(":")[0] for _, expected in MISTAKES])
def test_a_mistake_is_one_line_naming_file_and_key(write_config, change, expected):
    path = write_config(change=change)
    assert re.match(re.escape(f"{path}: ") + expected, message_of(path))


@pytest.mark.parametrize(("content", "expected"), [
    (b"", "experiment: missing, expected a string"),
    (b"# nothing\n---\n", "experiment: missing, expected a string"),
    (b"- a\n- b\n", r"got \['a', 'b'\] \(list\), allowed is a mapping with the keys experiment, "),
    (b"hello", "hello: unknown key"),
    (b"3", "not a YAML mapping: "),
    (b"a: [1\nb: {", r"not a YAML mapping \(line 2\): "),
    (b"a: 1\n\tb: 2\n", r"not a YAML mapping \(line 2\): "),
    (b"title: x\nitem: y\ntitle: z\n", r"not a YAML mapping \(line 3\): found duplicate key title"),
    (b"common:\n  a: {b: 1, b: 2}\n", r"not a YAML mapping \(line 2\): found duplicate key b"),
    (b"title: \xff\xfe", "not a YAML mapping: not UTF-8 text"),
    (b"title: \x00", "not a YAML mapping: "),
    (b"title: ${oops", "not a YAML mapping: "),
    (b"title: 1" + b"0" * 5000, "not a YAML mapping: Exceeds the limit"),
    (b"common: &a\n  - *a\n", r"not a YAML mapping \(line 1\): YAML recursive aliases"),
    (b"title: !!python/object/apply:os.getcwd []", r"not a YAML mapping \(line 1\): could not determine a constructor"),
])  # fmt: skip
def test_a_file_that_is_no_mapping_is_named(tmp_path, content, expected):
    path = tmp_path / "configs" / "adasplash" / "x.yaml"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert re.match(re.escape(f"{path}: ") + expected, message_of(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path, write_config, monkeypatch):
    assert message_of(tmp_path / "no.yaml", tmp_path) == f"config: no such file: {tmp_path / 'no.yaml'}"
    assert message_of(tmp_path, tmp_path) == f"config: {tmp_path} is a folder, a YAML file is needed"
    path = write_config()
    assert message_of(path / "x.yaml") == f"config: {path}/x.yaml cannot be read: Not a directory"

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert message_of(path) == f"config: {path} cannot be read: Permission denied"


def test_a_folder_without_configs_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"no experiment configs below {tmp_path}"):
        find_experiments(tmp_path)


def test_a_long_wrong_value_is_cut(write_config):
    text = message_of(write_config(change=put("title", ["word"] * 1000)))
    assert len(text) < 300 and "...' (list)" not in text and "... (list), allowed is a string" in text


# Settings


@dataclass(frozen=True)
class Train:
    steps: int
    lr: float = 0.1
    compile: bool = False
    betas: tuple[float, ...] = (0.9,)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, allowed is 1 or more")


@dataclass(frozen=True)
class Schema:
    train: Train
    name: str | None = None
    variants: dict[str, Train] | None = None


def settings_of(path: Path, scale: str = "smoke") -> Schema:
    return load_experiment(path, path.parents[1]).typed_settings(scale, Schema)


def wrong_settings(path: Path, scale: str = "smoke") -> str:
    with pytest.raises(ConfigError) as caught:
        settings_of(path, scale)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_scale_is_laid_over_common(write_config):
    def change(config):
        config["common"] = {"train": {"steps": 5, "lr": 1, "betas": [0.1, 0.2]}}
        config["scales"] = {"smoke": None, "lab": {"train": {"steps": 7, "betas": [0.5]}}, "paper": {"name": "x"}}

    path = write_config(change=change)
    assert settings_of(path, "smoke") == Schema(Train(5, 1.0, betas=(0.1, 0.2)))
    assert isinstance(settings_of(path).train.lr, float)
    assert settings_of(path, "lab") == Schema(Train(7, 1.0, betas=(0.5,)))
    assert settings_of(path, "paper") == Schema(Train(5, 1.0, betas=(0.1, 0.2)), "x")
    with pytest.raises(ConfigError, match="scale: got 'huge', allowed are smoke, lab, paper"):
        settings_of(path, "huge")


def test_numbers_may_be_written_with_an_exponent(write_config):
    path = write_config(change=put("common", {"train": {"steps": 1, "lr": "LR"}}))
    path.write_text(path.read_text().replace("LR", "6e-4"))
    assert settings_of(path).train.lr == 6e-4


@pytest.mark.parametrize(("smoke", "expected"), [
    ({"train": {"steps": "ten"}}, r"scales.smoke.train.steps: got 'ten' \(str\), allowed is an integer"),
    ({"train": {"steps": True}}, r"scales.smoke.train.steps: got True \(bool\), allowed is an integer"),
    ({"train": {"steps": 2.0}}, r"scales.smoke.train.steps: got 2.0 \(float\), allowed is an integer"),
    ({"train": {"steps": None}}, r"scales.smoke.train.steps: got nothing, allowed is an integer"),
    ({"train": {"steps": 0}}, r"scales.smoke.train.steps: got 0, allowed is 1 or more"),
    ({"train": {"lr": True}}, r"scales.smoke.train.lr: got True \(bool\), allowed is a number"),
    ({"train": {"lr": float("nan")}}, r"scales.smoke.train.lr: got nan \(float\), allowed is a number"),
    ({"train": {"lr": float("-inf")}}, r"scales.smoke.train.lr: got -inf \(float\), allowed is a number"),
    ({"train": {"lr": 10**400}}, r"scales.smoke.train.lr: got 1000\d*\.\.\. \(int\), allowed is a number"),
    ({"train": {"compile": 1}}, r"scales.smoke.train.compile: got 1 \(int\), allowed is true or false"),
    ({"train": {"betas": 0.9}}, r"scales.smoke.train.betas: got 0.9 \(float\), allowed is a list of a number"),
    ({"train": {"betas": [0.9, "x"]}}, r"scales.smoke.train.betas\[1\]: got 'x' \(str\), allowed is a number"),
    ({"train": {"stepz": 1}}, r"scales.smoke.train.stepz: unknown key, allowed are steps, lr, compile, betas"),
    ({"train": 3}, r"scales.smoke.train: got 3 \(int\), allowed is a mapping with the keys steps, "),
    ({"train": [1]}, r"scales.smoke.train: a list and a mapping cannot be merged"),
    ({"train": {"betas": {"a": 1}}}, r"scales.smoke.train.betas: a list and a mapping cannot be merged"),
    ({"extra": 1}, r"scales.smoke.extra: unknown key, allowed are train, name, variants"),
    ({"name": 1}, r"scales.smoke.name: got 1 \(int\), allowed is a string or null"),
    ({"variants": {"b_1.5": {"steps": "x"}}}, r"scales.smoke.variants.b_1.5.steps: got 'x'"),
    ({"variants": {"b_1.5": {"lr": 1}}}, r"scales.smoke.variants.b_1.5.steps: missing, expected an integer"),
    ({"train": {"lr": "${no.such.key}"}}, r"scales.smoke.train.lr: Interpolation key 'no.such.key' not found"),
    ({"train": {"lr": "???"}}, r"scales.smoke.train.lr: Missing mandatory value"),
])  # fmt: skip
def test_a_wrong_setting_is_one_line_naming_file_and_key(write_config, smoke, expected):
    def change(config):
        config["common"] = {"train": {"steps": 5, "betas": [0.9]}}
        config["scales"]["smoke"] = smoke

    path = write_config(change=change)
    assert re.match(re.escape(f"{path}: ") + expected, wrong_settings(path))
    settings_of(path, "lab")  # the other scales are fine


def test_a_wrong_setting_is_sought_where_it_was_written(write_config):
    path = write_config(change=put("common", {"train": {"steps": "ten"}, "variants": {"b_1.5": {"steps": 0}}}))
    assert wrong_settings(path).startswith(f"{path}: common.train.steps: got 'ten'")
    path = write_config(change=put("common", {"train": {"steps": 1}, "variants": {"b_1.5": {"steps": 0}}}))
    assert wrong_settings(path).startswith(f"{path}: common.variants.b_1.5.steps: got 0")
    path = write_config(change=put("common", {"train": {}}))
    assert wrong_settings(path) == f"{path}: scales.smoke.train.steps: missing, expected an integer"


# base


@pytest.fixture
def base(write_config):
    def change(config):
        config["common"] = {"train": {"steps": 5, "lr": 1}, "name": "base"}
        config["scales"] = {"smoke": {"train": {"steps": 6}}, "lab": {}, "paper": {"name": "paper base"}}

    return write_config("adasplash/base", change)


def derived(write_config, identity="adasplash/derived", **changes):
    def change(config):
        config["base"] = "adasplash/base"
        config.update(changes)

    return write_config(identity, change)


def test_settings_of_a_base_are_inherited_and_overridden(base, write_config):
    plain = derived(write_config, scales={})
    assert [settings_of(plain, s) for s in SCALES] == [settings_of(base, s) for s in SCALES]
    path = derived(write_config, common={"train": {"lr": 2}}, scales={"paper": {"train": {"steps": 9}}})
    assert settings_of(path, "smoke") == Schema(Train(6, 2.0), "base")
    assert settings_of(path, "paper") == Schema(Train(9, 2.0), "paper base")


def test_systems_and_rendering_of_a_base_are_inherited_where_they_are_not_given(base, write_config):
    def bare(config):
        config["base"] = "adasplash/base"
        del config["systems"], config["render"]

    path = write_config("adasplash/derived", bare)
    whole, derived = (load_experiment(x, x.parents[1]) for x in (base, path))
    assert (derived.systems, derived.render) == (whole.systems, whole.render)

    def with_another(config):
        bare(config)
        claim(of="c")(config | {"render": {"table": {}}})
        config["claims"] = [{"text": "", "kind": "ratio", "metric": "val_loss", "of": "c", "over": "a", "paper": 2}]

    path = write_config("adasplash/derived", with_another)
    assert message_of(path) == f"{path}: claims[0].of: system 'c' is not among systems: a, b_1.5"


def test_what_a_config_says_goes_over_all_of_its_base(base, write_config):
    path = derived(write_config, common={"train": {"steps": 50}, "name": "mine"})
    assert {(settings_of(path, s).train.steps, settings_of(path, s).name) for s in SCALES} == {(50, "mine")}


def test_a_mistake_in_a_base_names_the_file_of_the_base(base, write_config):
    path = derived(write_config)
    base.write_text(base.read_text().replace("lr: 1", "lr: fast"))
    assert wrong_settings(path).startswith(f"{base}: common.train.lr: got 'fast'")
    base.write_text(base.read_text() + "extra: 1\n")
    assert message_of(path).startswith(f"{base}: extra: unknown key")
    base.write_text("- a")
    assert message_of(path).startswith(f"{base}: got ['a']")


def test_a_list_in_place_of_a_mapping_of_the_base_is_named(base, write_config):
    path = derived(write_config, common={"train": [1]})
    assert wrong_settings(path) == f"{path}: common.train: a list and a mapping cannot be merged"


def test_a_base_of_a_base_is_refused(base, write_config):
    derived(write_config)
    path = derived(write_config, "adasplash/third")
    path.write_text(path.read_text().replace("base: adasplash/base", "base: adasplash/derived"))
    assert message_of(path) == f"{path}: base: 'adasplash/derived' has a base itself; name that one: 'adasplash/base'"


def test_configs_are_found_in_the_order_of_papers_and_names(write_config, tmp_path):
    for identity in ("adasplash2/table1", "adasplash/table2", "adasplash/figure1"):
        write_config(identity)
    found = find_experiments(tmp_path / "configs")
    assert [e.id for e in found] == ["adasplash/figure1", "adasplash/table2", "adasplash2/table1"]


def test_a_config_outside_the_tree_may_carry_the_id_of_another(write_config, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(write_config().read_text())))
    assert load_experiment(path, tmp_path / "configs").id == "adasplash/fake"


def test_from_plain_names_a_key_below_a_key():
    with pytest.raises(ConfigError, match=r"^train\.steps: missing, expected an integer$"):
        from_plain(Train, {}, "train")
    with pytest.raises(ConfigError, match=r"^train: got 'x' \(str\), allowed is a mapping with the keys steps"):
        from_plain(Train, "x", "train")
