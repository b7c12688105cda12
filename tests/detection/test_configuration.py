"""Configurations survive JSON, and what does not fit is refused by its full name."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import implicit
from detection.configuration import ConfigurationError, from_json, read_choice, to_json
from detection.data.transforms import AugmentationConfig
from detection.decoder.movement import Settled
from detection.models.config import (
    BackboneConfig,
    EquilibriumConfig,
    ModelConfig,
    PerturbationConfig,
    RecurrentConfig,
    StackedConfig,
)
from detection.recipes import recipe, recipe_names
from detection.training.recipe import Recipe


@dataclass(frozen=True)
class Leaf:
    number: float = 0.5
    choice: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Other:
    number: int = 1


@dataclass(frozen=True)
class Tree:
    count: int
    name: str
    flag: bool
    pair: tuple[float, int]
    many: tuple[Leaf, ...]
    either: Leaf | Other
    perhaps: Leaf | None = None


def through_text(value: Any) -> Any:
    """As a file would give it back."""
    return json.loads(json.dumps(to_json(value), allow_nan=False))


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types throughout, which ``==`` does not ask: 1 is 1.0 is True."""
    if type(a) is not type(b):
        return False
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


numbers = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.builds(Leaf, numbers, st.sampled_from(["a", "b"]))
trees = st.builds(
    Tree,
    count=st.integers(),
    name=st.text(),
    flag=st.booleans(),
    pair=st.tuples(numbers, st.integers()),
    many=st.lists(leaves, max_size=3).map(tuple),
    either=leaves | st.builds(Other, st.integers()),
    perhaps=st.none() | leaves,
)
equilibria = st.builds(
    EquilibriumConfig,
    train_steps=st.integers(12, 40),
    steps=st.integers(1, 99) | st.just("auto"),
    multiples=st.integers(0, 4),
    spacing=st.integers(1, 3),
    gradient=st.one_of(
        st.builds(implicit.RAG, st.integers(1, 5)),
        st.just(implicit.JFB()),
        st.builds(implicit.Neumann, st.integers(1, 5)),
        st.builds(implicit.Phantom, st.integers(1, 5)),
        st.just(implicit.Implicit()),
    ),
    solver=st.one_of(
        st.builds(implicit.Naive, damping=st.floats(0.1, 1)),
        st.builds(implicit.Anderson, memory=st.integers(1, 9)),
        st.builds(implicit.Broyden, memory=st.integers(1, 9)),
    ),
    perturbation=st.builds(
        PerturbationConfig,
        content=st.floats(0, 1),
        entry=st.sampled_from(["zero-step", "one-step", "multi-step"]),
    ),
)
decoders = (
    equilibria
    | st.builds(StackedConfig, st.integers(1, 9))
    | st.builds(RecurrentConfig, st.integers(1, 9), st.integers(1, 64))
)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives(name: str) -> None:
    made = recipe(name)
    assert same(from_json(Recipe, through_text(made)), made)


@given(tree=trees)
@settings(max_examples=60, deadline=None)
def test_any_configuration_survives(tree: Tree) -> None:
    assert same(from_json(Tree, through_text(tree)), tree)


@given(decoder=decoders)
@settings(max_examples=60, deadline=None)
def test_any_decoder_survives(decoder: EquilibriumConfig | StackedConfig | RecurrentConfig) -> None:
    model = ModelConfig(decoder=decoder)
    assert same(from_json(ModelConfig, through_text(model)), model)


def test_what_may_be_one_of_several_is_named() -> None:
    stored = through_text(ModelConfig(decoder=StackedConfig(3)))
    assert stored["decoder"] == {"type": "StackedConfig", "layers": 3}


def test_whole_numbers_are_read_where_floats_are_wanted() -> None:
    stored = through_text(Leaf()) | {"number": 2}
    assert same(from_json(Leaf, stored), Leaf(2.0))


def paths(stored: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """To every field of a stored configuration, in objects within objects."""
    if not isinstance(stored, dict):
        return []
    found = []
    for key, value in stored.items():
        if key != "type":
            found += [(*path, key), *paths(value, (*path, key))]
    return found


RECIPE_PATHS = paths(through_text(recipe("deqdet_r50_1x")))


def parent(stored: Any, path: tuple[str, ...]) -> Any:
    for key in path[:-1]:
        stored = stored[key]
    return stored


def refused(stored: Any, kind: type = Recipe) -> str:
    with pytest.raises(ConfigurationError) as caught:
        from_json(kind, stored)
    return str(caught.value)


def test_there_are_fields_at_every_depth() -> None:
    depths = {len(path) for path in RECIPE_PATHS}
    assert depths == {1, 2, 3, 4} and len(RECIPE_PATHS) > 50


@given(path=st.sampled_from(RECIPE_PATHS))
@settings(max_examples=80, deadline=None)
def test_a_missing_field_takes_its_default_or_is_named(path: tuple[str, ...]) -> None:
    """So what an earlier version wrote, before there was the field, stays readable."""
    stored = through_text(recipe("deqdet_r50_1x"))
    del parent(stored, path)[path[-1]]
    if path == ("name",):
        assert refused(stored) == "Recipe.name: missing."
        return
    read: Any = from_json(Recipe, stored)
    for key in path[:-1]:
        read = getattr(read, key)
    (field,) = (f for f in fields(read) if f.name == path[-1])
    default = field.default_factory() if field.default is MISSING else field.default
    assert getattr(read, path[-1]) == default


@given(path=st.sampled_from(RECIPE_PATHS))
@settings(max_examples=80, deadline=None)
def test_an_unknown_field_is_named_with_the_nearest(path: tuple[str, ...]) -> None:
    stored = through_text(recipe("deqdet_r50_1x"))
    where = parent(stored, path)
    where[path[-1] + "s"] = where.pop(path[-1])
    message = refused(stored)
    assert message.startswith(f"Recipe.{'.'.join(path)}s: unknown field. Did you mean '")


@given(path=st.sampled_from(RECIPE_PATHS))
@settings(max_examples=80, deadline=None)
def test_a_value_of_the_wrong_kind_is_named(path: tuple[str, ...]) -> None:
    stored = through_text(recipe("deqdet_r50_1x"))
    wrong: Any = ["neither", {"this": "nor that"}]
    parent(stored, path)[path[-1]] = wrong
    message = refused(stored)
    assert message.startswith(f"Recipe.{'.'.join(path)}")


def test_an_unknown_field_like_no_other_is_answered_with_all() -> None:
    message = refused(through_text(Leaf()) | {"zzz": 1}, Leaf)
    assert message == "Leaf.zzz: unknown field. Known: number, choice."


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 1.0, "Tree.count=1.0: must be int."),
        ("count", True, "Tree.count=True: must be int."),
        ("count", None, "Tree.count=None: must be int."),
        ("name", 3, "Tree.name=3: must be str."),
        ("flag", 1, "Tree.flag=1: must be bool."),
        ("flag", "yes", "Tree.flag='yes': must be bool."),
        ("pair", 1.5, "Tree.pair=1.5: must be a list."),
        ("pair", [1.0], "Tree.pair: 2 values are needed, got 1."),
        ("pair", [1.0, 0.5], r"Tree.pair[1]=0.5: must be int."),
        ("pair", [True, 1], r"Tree.pair[0]=True: must be float."),
        ("many", [3], "Tree.many[0]=3: must be an object with the fields of Leaf."),
        (
            "many",
            [{"type": "Leaf", "number": 1.0, "choice": "c"}],
            "Tree.many[0].choice='c': must be one of a, b.",
        ),
        ("many", [{"type": "Other"}], "Tree.many[0]: type 'Other' where Leaf is needed."),
        ("either", {"number": 1}, "Tree.either: type None is not one of Leaf, Other."),
        ("either", {"type": "Tree"}, "Tree.either: type 'Tree' is not one of Leaf, Other."),
        ("either", None, "Tree.either: type None is not one of Leaf, Other."),
        ("perhaps", "none", "Tree.perhaps='none': must be an object with the fields of Leaf."),
    ],
)
def test_messages(field: str, value: Any, message: str) -> None:
    tree = Tree(1, "x", True, (1.0, 2), (), Leaf())
    assert refused(through_text(tree) | {field: value}, Tree) == message


def test_values_that_the_configuration_refuses_are_placed() -> None:
    stored = through_text(recipe("deqdet_r50_1x"))
    stored["model"]["decoder"]["multiples"] = 7
    message = refused(stored)
    assert message.startswith("Recipe.model.decoder: positions(m=7, C=3, T=20): the last multiple")


def test_another_place_may_be_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^checkpoint\.pt\.number='x': must be float"):
        from_json(Leaf, {"type": "Leaf", "number": "x", "choice": "a"}, "checkpoint.pt")


SOLVERS = (implicit.Naive, implicit.Anderson, implicit.Broyden)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Naive", implicit.Naive()),
        ("Naive()", implicit.Naive()),
        ("Anderson(memory=3)", implicit.Anderson(memory=3)),
        (" Broyden ( memory = 4 ) ", implicit.Broyden(memory=4)),
        ("Naive(damping=1)", implicit.Naive(damping=1.0)),
    ],
)
def test_choices_from_text(text: str, value: Any) -> None:
    assert same(read_choice(text.strip(), SOLVERS), value)


def test_choices_may_hold_configurations_of_their_own() -> None:
    """The defaults of an implicit gradient's own solver are filled in."""
    assert same(read_choice("Implicit()", (implicit.Implicit, implicit.RAG)), implicit.Implicit())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' cannot be read: use one of Naive"),
        ("Anderson(", "cannot be read"),
        ("Anderson(3)", "with arguments by name"),
        ("1 + 1", "cannot be read"),
        ("implicit.Naive()", "cannot be read"),
        ("Newton()", "There is no 'Newton' here: use one of Naive"),
        ("Anderson(memory=open('x'))", "arguments must be plain values"),
        ("Anderson(memory='x')", "Anderson.memory='x': must be int"),
        ("Anderson(memry=3)", "Anderson.memry: unknown field. Did you mean 'memory'"),
        ("Naive(damping=-1)", "^Naive: "),
        ("Naive(**{'damping': 1.0})", "unknown field|cannot be read"),
    ],
)
def test_text_that_is_no_choice(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_choice(text, SOLVERS)


def test_nothing_is_run() -> None:
    with pytest.raises(ConfigurationError):
        read_choice("Naive(damping=__import__('os').getpid())", SOLVERS)


def test_configurations_refuse_what_cannot_be() -> None:
    for make in (
        lambda: StackedConfig(0),
        lambda: RecurrentConfig(steps=0),
        lambda: RecurrentConfig(initial_points=0),
        lambda: EquilibriumConfig(train_steps=0),
        lambda: EquilibriumConfig(steps=0),
        lambda: EquilibriumConfig(initial_points=0),
        lambda: EquilibriumConfig(extra_supervision=-1),
        lambda: EquilibriumConfig(multiples=7, spacing=3, train_steps=20),
        lambda: ModelConfig(num_queries=0),
    ):
        with pytest.raises(ValueError):
            make()
    assert EquilibriumConfig(extra_supervision=0).extra_supervision == 0


def test_literals_of_another_type_are_refused() -> None:
    """``True == 1`` must not make a kernel size of it."""
    stored = through_text(ModelConfig(backbone=BackboneConfig("small", pretrained=False)))
    stored["neck"]["kernel_size"] = True
    assert refused(stored, ModelConfig) == "ModelConfig.neck.kernel_size=True: must be one of 1, 3."


def test_optional_pairs_survive() -> None:
    for jitter in (None, (0.5, 2.0)):
        augmentation = AugmentationConfig(scale_jitter=jitter)
        assert same(from_json(AugmentationConfig, through_text(augmentation)), augmentation)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ({"pixels": 1.0, "score": 0.02, "least_score": 0.05}, Settled()),
        ({"pixels": 1.0, "score": 0.1, "least_score": 0.3}, Settled(score=0.1)),
        ({"pixels": 0.25, "score": 0.02, "least_score": 0.05}, Settled(pixels=0.25)),
        ({"least_score": 0.3}, Settled()),
        ({"pixels": 1.0, "score": 0.02}, Settled(pixels=1.0, score=0.02)),  # chosen since
    ],
)
def test_limits_of_the_earlier_rule_are_read(stored: dict[str, Any], wanted: Settled) -> None:
    """Checkpoints hold them: defaults of then become those of now, what was chosen stays."""
    model = through_text(ModelConfig())
    model["decoder"]["settled"] = {"type": "Settled", **stored}
    read = from_json(ModelConfig, model).decoder
    assert isinstance(read, EquilibriumConfig) and read.settled == wanted


def test_beside_the_earlier_limits_nothing_is_passed_over() -> None:
    stored = {"least_score": 0.05, "pixel": None}
    assert refused(stored, Settled) == "Settled.pixel: unknown field. Did you mean 'pixels'?"
    assert refused({"least_score": 0.05, "pixels": "1"}, Settled).startswith("Settled.pixels='1'")
