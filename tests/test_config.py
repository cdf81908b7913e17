"""The configuration: dataclasses to an editable form and back, strict types, nearest names, and every refusal."""

import dataclasses
import json
import math
from pathlib import Path

import ml_collections
import pytest

from attnlab.attention.mixer import MIXERS
from attnlab.config import (
    ConfigError,
    Experiment,
    check_field,
    default_config,
    from_config_dict,
    read_experiment,
    to_config_dict,
    to_dict,
    with_variant,
)


def changed(**fields) -> Experiment:
    """The default experiment with fields such as model__mixers__forgetting__window=3 set through its ConfigDict."""
    config = default_config()
    for path, value in fields.items():
        *parts, name = path.split("__")
        part = config
        for step in parts:
            part = part[step]
        part[name] = value
    return from_config_dict(config)


@pytest.mark.smoke
def test_the_round_trip_gives_every_field_back():
    experiment = changed(
        data__data_dir="/elsewhere",  # None by default, so a placeholder that knows its type
        training__accumulate=3,
        model__mixers__forgetting__window=7,
        model__mixers__softmax__num_heads=5,
    )
    assert experiment != Experiment()
    assert experiment.data.data_dir == "/elsewhere" and Experiment().data.data_dir is None
    assert experiment.model.mixers["forgetting"].window == 7
    assert experiment.model.mixers["softmax"].num_heads == 5
    assert type(experiment.model.mixers["forgetting"]) is type(MIXERS["forgetting"].Config())
    assert from_config_dict(to_config_dict(experiment)) == experiment
    assert from_config_dict(default_config()) == Experiment()


def test_missing_fields_keep_their_defaults_at_every_level():
    experiment = from_config_dict({"model": {"mixers": {"forgetting": {"window": 7}}}})
    assert experiment == changed(model__mixers__forgetting__window=7)
    assert set(experiment.model.mixers) == set(MIXERS)
    assert from_config_dict({}) == Experiment()


def test_the_editable_form_is_locked_and_typed():
    config = default_config()
    with pytest.raises(AttributeError, match="stpes"):
        config.training.stpes = 3
    with pytest.raises(TypeError):
        config.training.steps = "3"
    with pytest.raises(TypeError):
        config.data.data_dir = 3
    config.training.optimizer.schedule.peak = 1  # a whole number is a fraction too
    assert type(from_config_dict(config).training.optimizer.schedule.peak) is float


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"training": {"steps": "3"}}, "config.training.steps='3' is a str; it must be a int"),
        ({"training": {"steps": 3.0}}, "config.training.steps=3.0 is a float"),
        ({"training": {"steps": True}}, "config.training.steps=True is a bool"),
        ({"training": {"steps": None}}, "config.training.steps=None is a NoneType"),
        ({"data": {"isolate_documents": 1}}, "config.data.isolate_documents=1 is a int; it must be a bool"),
        ({"data": {"data_dir": 3}}, "config.data.data_dir=3 is a int; it must be a str"),
        ({"training": {"checkpoint": {"verify": 3}}}, "verify=3 is a int; it must be a str"),
        ({"model": 3}, "config.model=3 is a int; it must hold fields"),
        ({"model": {"mixers": [1]}}, r"config.model.mixers=\[1\] is a list; it must hold fields"),
        ({"training": {"optimizer": None}}, "config.training.optimizer=None is a NoneType"),
        ([], r"config=\[\] is a list"),
        ({"modle": {}}, "config has no field 'modle'; did you mean 'model'?"),
        ({"training": {"stpes": 1}}, "config.training has no field 'stpes'; did you mean 'steps'?"),
        (
            {"training": {"optimizer": {"schedule": {"peek": 1}}}},
            "schedule has no field 'peek'; did you mean 'peak'?",
        ),
        (
            {"model": {"mixers": {"sofmax": {}}}},
            "config.model.mixers has no entry 'sofmax'; did you mean 'softmax'?",
        ),
        (
            {"model": {"mixers": {"forgetting": {"windw": 1}}}},
            "mixers.forgetting has no field 'windw'; did you mean 'win",
        ),
        ({"training": {"mesh": {"x": 1}}}, "mesh has no field 'x'; it has data, fsdp, sequence, tensor"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(values, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        from_config_dict(values)


def test_placeholders_may_stay_empty_or_be_emptied_again():
    assert from_config_dict({"data": {"data_dir": None}}).data.data_dir is None
    config = default_config()
    config.data.data_dir = "/elsewhere"
    config.data.data_dir = None
    assert from_config_dict(config) == Experiment()


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("training.stpes", "config.training has no field 'stpes'; did you mean 'steps'?"),
        ("trainin.steps", "config has no field 'trainin'; did you mean 'training'?"),
        ("model.mixers.sofmax.rope", "config.model.mixers has no field 'sofmax'; did you mean 'softmax'?"),
        ("training.steps.more", "config.training.steps has no field 'more'"),
    ],
)
def test_paths_of_fields_are_checked(path, sentence):
    check_field("training.optimizer.schedule.peak")
    check_field("model.mixers.forgetting.window")
    with pytest.raises(ConfigError) as error:
        check_field(path)
    assert sentence in str(error.value)


class TestJson:
    def test_an_experiment_survives(self, tmp_path):
        """The lower clamp of the forget gate is minus infinity, and data_dir None."""
        experiment = changed(model__layers="forgetting + softmax(window=3)", training__steps=7)
        assert experiment.model.mixers["forgetting"].log_f_min == -math.inf
        path = tmp_path / "config.json"
        path.write_text(json.dumps(to_dict(experiment)))
        assert read_experiment(path) == experiment

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b'{"task": "lang', "Unterminated string"),
            (b"", "Expecting value"),
            (b"\xff\xfe", "'utf-8' codec can't decode"),
            (b"[1]", r"config=\[1\] is a list"),
            (b'{"modle": {}}', "config has no field 'modle'; did you mean 'model'"),
        ],
    )
    def test_anything_else_is_refused_by_the_name_of_the_file(self, content, sentence, tmp_path):
        path = tmp_path / "config.json"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"{path} does not hold an experiment .*{sentence}"):
            read_experiment(path)


class TestVariants:
    def test_the_smoke_form_is_small_and_keeps_the_pattern(self):
        config = default_config()
        config.model.layers = "forgetting*2 + softmax"
        config.model.num_layers = 12
        config.model.mixers.forgetting.qk_norm = True
        config.training.seed = 5
        experiment = from_config_dict(with_variant(config, "smoke"))
        experiment.validate(1)
        assert experiment.model.num_layers == 3 and len(experiment.model.layer_configs()) == 3
        assert experiment.model.mixers["forgetting"].qk_norm and experiment.training.seed == 5
        assert (experiment.training.steps, experiment.model.hidden_size) == (12, 32)

    def test_the_smoke_form_of_reinforcement_learning_needs_no_other_run(self):
        config = default_config()
        config.update({"task": "grpo", "init_from": "runs/other"})
        config.grpo.update({"group_size": 64, "minibatches": 16, "overlong_cache": 512})
        config.grpo.rollout.update({"max_new_tokens": 4096, "temperature": 0.7})
        config.eval.pass_at = (1, 8)
        experiment = from_config_dict(with_variant(config, "smoke"))
        experiment.validate(8)
        assert (experiment.init_from, experiment.grpo.group_size, experiment.grpo.minibatches) == ("", 4, 1)
        assert (experiment.grpo.rollout.max_new_tokens, experiment.grpo.rollout.temperature) == (8, 0.7)
        assert (experiment.eval.problems, experiment.eval.pass_at) == (8, (1, 4))

    @pytest.mark.parametrize(("layers", "smallest"), [("forgetting", 2), ("forgetting*3", 3)])
    def test_equal_layers_are_at_least_two(self, layers, smallest):
        """One layer would not show a scan over layers."""
        config = default_config()
        config.model.layers = layers
        assert with_variant(config, "smoke").model.num_layers == smallest

    def test_other_variants(self):
        config = default_config()
        assert with_variant(config, "") is config and from_config_dict(config) == Experiment()
        with pytest.raises(ConfigError, match="variant 'smok' is unknown; use FILE or FILE:smoke"):
            with_variant(config, "smok")


INVALID = {
    "task='sort' is unknown": {"task": "sort"},
    "model.hidden_size=0 must be at least 1": {"model__hidden_size": 0},
    "model.num_heads=-1 must be at least 1": {"model__num_heads": -1},
    "model.vocab_multiple=0": {"model__vocab_multiple": 0},
    "model.dtype='float8' is unknown": {"model__dtype": "float8"},
    "model.remat='all' is unknown": {"model__remat": "all"},
    "model.logit_soft_cap=-1.0 is negative": {"model__logit_soft_cap": -1.0},
    "num_layers=5 is not a multiple of the 2 layers": {
        "model__layers": "forgetting + softmax",
        "model__num_layers": 5,
    },
    "num_layers=0 is not": {"model__num_layers": 0},
    "unknown mixer 'sofmax'; did you mean 'softmax'": {"model__layers": "sofmax"},
    "cannot repeat 0 times": {"model__layers": "softmax*0"},
    "is neither a mixer nor": {"model__layers": "softmax - softmax"},
    "'softmax' has no option 'windw'": {"model__layers": "softmax(windw=3)"},
    "(window='3') has the wrong type": {"model__layers": "softmax(window='3')"},
    "num_heads=4 is not a multiple of num_kv_heads=3": {"model__num_kv_heads": 3},
    "hidden_size=256 is not a multiple of num_heads=3": {"model__num_heads": 3},
    "gate='ful' is unknown": {"model__mixers__forgetting__gate": "ful"},
    "sequence_length=0 must be at least 1": {"data__sequence_length": 0},
    "seed=-1 must lie in": {"data__seed": -1},
    "packing='tight' must be one of": {"data__packing": "tight"},
    "source='ftp:x' must begin with": {"data__source": "ftp:x"},
    "tokenizer='words' must begin with": {"data__tokenizer": "words"},
    "eval_split is empty": {"data__eval_split": ""},
    "z_loss=-1.0 is negative": {"language_modelling__z_loss": -1.0},
    "training.steps=0 must be at least 1": {"training__steps": 0},
    "training.accumulate=0 must be at least 1": {"training__accumulate": 0},
    "training.log_every=0": {"training__log_every": 0},
    "training.nonfinite='go' is unknown": {"training__nonfinite": "go"},
    "training.peak_flops=-1.0 is negative": {"training__peak_flops": -1.0},
    "optimizer.b1=1.0": {"training__optimizer__b1": 1.0},
    "optimizer.weight_decay=-0.1": {"training__optimizer__weight_decay": -0.1},
    "optimizer.no_decay='(' is not a regular expression": {"training__optimizer__no_decay": "("},
    "schedule.shape='wavy' is unknown": {"training__optimizer__schedule__shape": "wavy"},
    "schedule.peak=0.0 must be positive": {"training__optimizer__schedule__peak": 0.0},
    "schedule.warmup_steps=100 must be at least 0 and below": {"training__steps": 100},
    "schedule.final_fraction=1.5": {"training__optimizer__schedule__final_fraction": 1.5},
    "checkpoint every=0": {"training__checkpoint__every": 0},
    "verify='look' must be": {"training__checkpoint__verify": "look"},
    "does not fill 8 devices": {"training__mesh__data": 3},
    "needs sizes of at least 1, and at most one -1": {"training__mesh__fsdp": -1},
    "needs sizes of at least 1": {"training__mesh__tensor": 0},
    "data.batch_size=12 is not a multiple of mesh data 8 x fsdp 1 x training.accumulate 1 = 8": {
        "data__batch_size": 12
    },
    "= 16; change one of them": {"data__batch_size": 24, "training__accumulate": 2},
    "data.sequence_length=510 is not a multiple of mesh.sequence=4": {
        "data__sequence_length": 510,
        "training__mesh__sequence": 4,
    },
    "eval.batches=-1 must be at least 0": {"eval__batches": -1},
    "eval.samples=0 must be at least 1": {"eval__samples": 0},
    "eval.per_position_smoothing=4 must be odd": {"eval__per_position_smoothing": 4},
    "eval.temperature=-1.0": {"eval__temperature": -1.0},
    "eval.top_p=0.0": {"eval__top_p": 0.0},
}


@pytest.mark.parametrize("sentence", INVALID)
def test_what_does_not_go_together_is_refused_before_anything_is_compiled(sentence):
    experiment = changed(**INVALID[sentence])
    with pytest.raises(ConfigError) as error:
        experiment.validate(8)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_default_experiment_is_valid_on_any_power_of_two():
    for devices in (1, 2, 4, 8, 16):
        Experiment().validate(devices)


def test_every_field_is_reachable_in_the_editable_form():
    """So that nothing is declared twice, and nothing is left out of the command line."""

    def names(part, where=""):
        if dataclasses.is_dataclass(part):
            part = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        if not isinstance(part, (dict, ml_collections.ConfigDict)):
            return {where}
        return {found for name in part for found in names(part[name], f"{where}.{name}")}

    assert names(default_config()) == names(Experiment())
    assert Path("model/mixers/forgetting/window").as_posix().replace("/", ".") in {
        n[1:] for n in names(default_config())
    }
