"""Configuration: JSON round trip, overrides, nearest names, and no exception but ConfigError for any JSON."""

from __future__ import annotations

import dataclasses
import json
import typing
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qtemper import BitPolicy, Rule, get_method
from qtemper.config import Experiment, flatten, from_dict, from_json, override, to_dict, to_json
from qtemper.errors import ConfigError, nearest
from qtemper.methods.tempering import NoiseTempering
from qtemper.recipes import available, get_recipe
from qtemper.schedules import Constant, Cosine, Exponential, Linear, Step
from qtemper.train import OptimConfig, TrainConfig

DIGITS = "digits-w2a2-tempering"
CIFAR = "cifar10-resnet20-w2a2-tempering"
# Same examples every run; no deadline, because other processes share the machine.
BOUNDED = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("name", available())
def test_every_recipe_survives_json(name: str) -> None:
    experiment = get_recipe(name)
    assert experiment.name == name
    text = to_json(experiment)
    assert from_json(text) == experiment
    assert to_json(from_json(text)) == text
    json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON


def test_values_other_than_the_defaults_survive_json() -> None:
    experiment = dataclasses.replace(
        get_recipe(DIGITS),
        method=get_method("tempering", noise="gaussian", temperature=Linear(0.5, 0.1), delta_rule="hessian"),
        policy=BitPolicy(3, 5, "8bit", (Rule("conv*", weight=2), Rule("fc", activation_granularity="channel"))),
        train=TrainConfig(optim=OptimConfig(schedule=Step(1.0, 0.3, (0.25, 0.5, 0.9)), quantizer_optimizer="adam")),
        seed=2**62,
    )
    back = from_json(to_json(experiment))
    assert back == experiment
    assert isinstance(back.policy.rules[1], Rule)
    assert isinstance(back.train.optim.schedule, Step)


@pytest.mark.parametrize("name", [DIGITS, CIFAR, "cifar100-resnet20-w1a1-ewgs", "cifar10-resnet20-float"])
def test_setting_any_field_to_its_own_value_changes_nothing(name: str) -> None:
    experiment = get_recipe(name)
    assignments = [f"{path}={json.dumps(value)}" for path, value in flatten(to_dict(experiment)).items()]
    for assignment in assignments:
        assert override(experiment, [assignment]) == experiment, assignment
    assert override(experiment, assignments) == experiment


def test_own_values_change_nothing_where_they_are_not_the_defaults() -> None:
    experiment = override(
        get_recipe(DIGITS), ["method.noise=gaussian", "method.temperature.start=0.5", "train.optim.schedule.start=0.7"]
    )
    for path, value in flatten(to_dict(experiment)).items():
        assert override(experiment, [f"{path}={json.dumps(value)}"]) == experiment, path


def test_changing_the_data_set_keeps_the_other_data_settings() -> None:
    before = get_recipe(CIFAR)
    after = override(before, ["data.name=cifar100"])
    assert after.data == dataclasses.replace(before.data, name="cifar100")
    assert after.data.normalization == "imagenet"


@pytest.mark.parametrize("assignment", ["method=lsq", "method.name=lsq", 'method={"name": "lsq"}'])
def test_another_method_replaces_the_old_one_whole(assignment: str) -> None:
    start = override(get_recipe(DIGITS), ["method.noise=gaussian"])
    experiment = override(start, [assignment])
    assert experiment.method == get_method("lsq")
    assert set(to_dict(experiment.method)) == {"name"}
    with pytest.raises(ConfigError, match="method.noise=gaussian is undone by"):
        override(get_recipe(DIGITS), ["method.noise=gaussian", assignment])


def test_the_method_that_is_there_already_keeps_its_settings() -> None:
    start = override(get_recipe(DIGITS), ["method.noise=gaussian"])
    for assignment in ("method=tempering", "method.name=tempering"):
        assert override(start, [assignment]) == start


def test_shorthands() -> None:
    changed = override(get_recipe(DIGITS), ["bits=W3A5", "train.optim.lr=.05"])
    assert (changed.policy.weight, changed.policy.activation) == (3, 5)
    assert changed.train.optim.lr == 0.05


def test_a_replaced_method_has_its_own_fields_and_not_the_old_ones() -> None:
    changed = override(get_recipe(DIGITS), ["method=ewgs", "method.rule=fixed", "method.delta_weight=0.5"])
    assert changed.method == get_method("ewgs", rule="fixed", delta_weight=0.5)
    with pytest.raises(ConfigError, match=r"'method\.noise'.*did you mean") as caught:
        override(get_recipe(DIGITS), ["method=ewgs", "method.noise=gaussian"])
    assert "method." in str(caught.value).partition("mean")[2]


def test_a_method_from_nothing_and_back() -> None:
    experiment = override(get_recipe("cifar10-resnet20-float"), ["method=tempering"])
    assert experiment.method == NoiseTempering()
    assert override(experiment, ["method=null"]).method is None
    assert override(experiment, ["method=None"]).method is None


def test_schedules_are_replaced_by_name_and_by_their_fields() -> None:
    for name, schedule in {"constant": Constant(), "step": Step(), "cosine": Cosine(), "linear": Linear()}.items():
        assert override(get_recipe(DIGITS), [f"train.optim.schedule={name}"]).train.optim.schedule == schedule
    stepped = override(
        get_recipe(DIGITS), ["train.optim.schedule.name=step", "train.optim.schedule.milestones=[0.2, 0.4]"]
    )
    assert stepped.train.optim.schedule == Step(milestones=(0.2, 0.4))
    tempered = override(get_recipe(DIGITS), ["method.temperature.end=0.5"])
    assert isinstance(tempered.method, NoiseTempering)
    assert isinstance(tempered.method.temperature, Exponential)
    assert tempered.method.temperature.end == 0.5


def test_later_assignments_win_and_the_recipe_stays() -> None:
    experiment = get_recipe(DIGITS)
    before = to_json(experiment)
    assert override(experiment, ["seed=1", "seed=2"]).seed == 2
    assert override(experiment, [" train.epochs = 3 "]).train.epochs == 3
    assert override(experiment, ["train.optim.lr=1"]).train.optim.lr == 1.0  # an integer is a float
    assert override(experiment, ['policy.rules=[{"pattern": "fc", "weight": 8}]']).policy.rules == (Rule("fc", 8),)
    assert to_json(experiment) == before


@pytest.mark.parametrize(
    ("assignment", "suggestion"),
    [
        ("metod=lsq", "'method'"),
        ("train.epoch=3", "'train.epochs'"),
        ("train.optm.lr=3", "'train.optim.lr'"),
        ("train.optim.shedule=step", "'train.optim.schedule'"),
        ("method.temprature=constant", "'method.temperature'"),
        ("calibration.observr=max", "'calibration.observer'"),
        ("train.optim.schedule=cosin", "'cosine'"),
        ("method=lsqq", "'lsq'"),
        ("data.normalization=imagnet", "'imagenet'"),
        ('policy.rules=[{"patern": "fc"}]', "'pattern'"),
    ],
)
def test_a_typo_gets_the_nearest_name(assignment: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {suggestion}"):
        override(get_recipe(DIGITS), [assignment])


def test_nearest_name_or_all_of_them() -> None:
    assert nearest("temperng", ["lsq", "tempering"]) == "did you mean 'tempering'?"
    assert nearest("xyz", ["b", "a"]) == "known: a, b."


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.optim.lr", float("nan")),
        ("train.optim.lr", float("inf")),
        ("train.optim.lr", 10**400),
        ("train.optim.lr", True),
        ("train.epochs", 1.0),
        ("train.epochs", True),
        ("train.epochs", 0),
        ("train.compile", 1),
        ("train.evaluate_every", -1),
        ("train.loss.distillation", 1.5),
        ("train.loss.distillation_temperature", 0),
        ("calibration.batches", 0),
        ("policy.first_last", 8),
        ("policy.weight", True),
        ("policy.rules", "fc"),
        ("seed", -1),
        ("seed", 2**63),
        ("train", None),
        ("name", 5),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_path(path: str, value: Any) -> None:
    data = to_dict(get_recipe(DIGITS))
    *parents, leaf = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert leaf in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("path", ["name", "data", "model"])
def test_a_missing_field_is_named(path: str) -> None:
    data = to_dict(get_recipe(DIGITS))
    del data[path]
    with pytest.raises(ConfigError, match=f"^{path} is missing"):
        from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"name": "x"', b"\xff\xfe\x00\x01", "nul", "1" * 5000])
def test_text_that_is_no_json_is_refused_with_its_source(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^here\.json"):
        from_json(text, source="here.json")


# --- any JSON ----------------------------------------------------------------------------------------------------

_known_keys = sorted({key for path in flatten(to_dict(get_recipe(DIGITS))) for key in path.split(".")})
_known_values = sorted(
    {v for v in flatten(to_dict(get_recipe(DIGITS))).values() if isinstance(v, str)} | {"lsq", "step", "linear"}
)
_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 0, 1])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(_known_values)
)
_json = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(_known_keys) | st.text(max_size=8), inner, max_size=6)
    ),
    max_leaves=20,
)


def only_config_error(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a setting without effect may say so
        try:
            experiment = from_json(text)
        except ConfigError as error:
            assert "\n" not in str(error)  # noqa: PT017 (most texts must fail, a few may not)
        else:
            assert isinstance(experiment, Experiment)
            assert from_json(to_json(experiment)) == experiment


@BOUNDED
@given(_json)
@example([])
@example({"": 1})
@example({"name": "x", "data": {}, "model": {}})
def test_arbitrary_json_raises_nothing_but_config_error(data: Any) -> None:
    only_config_error(json.dumps(data))


@BOUNDED
@given(st.text(max_size=40))
def test_arbitrary_text_raises_nothing_but_config_error(text: str) -> None:
    only_config_error(text)


@BOUNDED
@given(st.sampled_from([DIGITS, CIFAR, "cifar10-resnet20-w1a1-ewgs"]), st.data())
def test_a_sound_configuration_with_one_or_two_odd_values(name: str, data: st.DataObject) -> None:
    content = to_dict(get_recipe(name))
    for _ in range(data.draw(st.integers(1, 2))):
        node: Any = content
        while True:  # walk down to a random depth
            key = data.draw(st.sampled_from(sorted(node)))
            if not (isinstance(node[key], dict) and node[key]) or data.draw(st.integers(0, 3)) == 0:
                break
            node = node[key]
        node[key] = data.draw(_json)
    only_config_error(json.dumps(content))


@BOUNDED
@given(st.sampled_from(sorted(flatten(to_dict(get_recipe(DIGITS))))), st.text(max_size=12) | _json.map(json.dumps))
@example("method.name", '["lsq"]')
@example("train.optim.schedule.name", "{}")
def test_arbitrary_assignments_raise_nothing_but_config_error(path: str, value: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            override(get_recipe(DIGITS), [f"{path}={value}"])
        except ConfigError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_every_field_of_every_configuration_is_explained() -> None:
    """House rule 8: config is explained field by field."""
    todo: list[Any] = [Experiment]
    seen: set[Any] = set()
    while todo:
        cls = todo.pop()
        if cls in seen:
            continue
        seen.add(cls)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            assert f"{field.name}:" in (cls.__doc__ or ""), f"{cls.__name__}.{field.name}"
            kind = hints[field.name]
            todo += [k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)]
    assert len(seen) >= 8
