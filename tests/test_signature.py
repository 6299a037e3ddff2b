"""The classes' names, signatures, defaults, and what they refuse."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from conftest import frozen
from torch.nn import Parameter

import qadam
import qadam.optim
from qadam import _core

pytestmark = pytest.mark.cpu_only

BASE = ["Adam", "Adam8bit", "Adam32bit", "AdamW", "AdamW8bit", "AdamW32bit"]
PAGED = [f"Paged{name}" for name in BASE]
SIGNATURE = {
    "params": inspect.Parameter.empty,
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0,
    "amsgrad": False,
    "optim_bits": 32,
    "args": None,
    "min_8bit_size": 4096,
    "percentile_clipping": 100,
    "block_wise": True,
    "is_paged": False,
}
CLASSES = [getattr(qadam, name) for name in BASE + PAGED]


def one():
    return [Parameter(torch.ones(3))]


@pytest.mark.parametrize("name", BASE + PAGED)
def test_classes_are_torch_optimizers_at_both_places(name):
    cls = getattr(qadam, name)
    assert cls is getattr(qadam.optim, name)
    assert issubclass(cls, torch.optim.Optimizer)
    assert cls.__name__ == name
    assert name in qadam.__all__
    assert name in qadam.optim.__all__


@pytest.mark.parametrize("name", BASE + PAGED)
def test_signature_is_that_of_the_design_and_extras_are_keyword_only(name):
    parameters = list(inspect.signature(getattr(qadam, name)).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert parameters[: len(positional)] == positional
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(positional) :])
    assert all(p.default is not p.empty for p in parameters[len(positional) :])
    expected = SIGNATURE | ({"weight_decay": 1e-2} if "AdamW" in name else {})
    assert [(p.name, p.default) for p in positional] == list(expected.items())


@pytest.mark.parametrize("cls", CLASSES)
def test_all_arguments_work_by_position(cls):
    bits = 8 if cls.__name__.endswith("8bit") else 32
    optimizer = cls(
        one(), 0.5, (0.8, 0.9), 1e-6, 0.25, False, bits, None, 7, 100, True, False
    )  # fmt: skip
    group = optimizer.param_groups[0]
    assert [group[k] for k in ("lr", "betas", "eps", "weight_decay")] == [
        0.5,
        (0.8, 0.9),
        1e-6,
        0.25,
    ]


@pytest.mark.parametrize(
    ("name", "bits", "width"),
    [
        ("Adam", 32, 32),
        ("Adam", 8, 8),
        ("AdamW", 32, 32),
        ("AdamW", 8, 8),
        ("Adam8bit", 32, 8),
        ("Adam8bit", 8, 8),
        ("AdamW8bit", 8, 8),
        ("Adam32bit", 32, 32),
        ("AdamW32bit", 32, 32),
        ("PagedAdam", 32, 32),
        ("PagedAdamW", 8, 8),
        ("PagedAdam8bit", 32, 8),
        ("PagedAdamW8bit", 8, 8),
        ("PagedAdam32bit", 32, 32),
        ("PagedAdamW32bit", 32, 32),
    ],
)
def test_width_is_that_of_the_name_or_of_optim_bits(name, bits, width):
    params = one()
    optimizer = getattr(qadam, name)(params, optim_bits=bits, min_8bit_size=0)
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert ("exp_avg_code" in optimizer.state[params[0]]) == (width == 8)
    assert ("exp_avg" in optimizer.state[params[0]]) == (width == 32)


@pytest.mark.parametrize("name", [name for name in BASE + PAGED if name.endswith("32bit")])
def test_optim_bits_that_contradict_the_name_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}.*32.*optim_bits=8"):
        getattr(qadam, name)(one(), optim_bits=8)


def test_differentiable_set_in_a_group_between_steps_is_not_ignored():
    """torch obeys it from the next step on."""
    params = one()
    optimizer = qadam.AdamW(params)
    params[0].grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["differentiable"] = True
    before = frozen(optimizer)
    with pytest.raises(ValueError, match="differentiable of group 0 is True"):
        optimizer.step()
    assert frozen(optimizer) == before


@pytest.mark.parametrize(
    "harmless",
    [
        {"foreach": True},
        {"fused": True},
        {"capturable": False},
        {"maximize": False},
        {"amsgrad": False},
        {"initial_lr": 0.1},
        {"name": "head"},
    ],
    ids=repr,
)
def test_group_entries_that_change_no_update_are_kept(harmless):
    optimizer = qadam.AdamW([{"params": one(), **harmless}])
    assert harmless.items() <= optimizer.param_groups[0].items()


NAN, INF = float("nan"), float("inf")
BAD = [
    ("lr", -1.0, ["lr", "-1", "at least 0"]),
    ("lr", NAN, ["lr", "NaN", "finite"]),
    ("lr", INF, ["lr", "inf", "finite"]),
    ("lr", None, ["lr", "None", "number"]),
    ("lr", "1e-3", ["lr", "'1e-3'", "number"]),
    ("lr", torch.ones(2), ["lr", "number", r"\(2,\)"]),
    ("betas", (1.0, 0.9), ["betas", "1", "at least 0 and less than 1"]),
    ("betas", (0.9, 1.5), ["betas", "1.5", "at least 0 and less than 1"]),
    ("betas", (-0.1, 0.9), ["betas", "-0.1", "at least 0 and less than 1"]),
    ("betas", (NAN, 0.9), ["betas", "NaN", "at least 0 and less than 1"]),
    ("betas", (0.9,), ["betas", r"\(0.9,\)", "two numbers"]),
    ("betas", (0.9, 0.99, 0.999), ["betas", "0.999", "two numbers"]),
    ("betas", 0.9, ["betas", "0.9", "two numbers"]),
    ("betas", ("a", 0.9), ["betas", "'a'", "number"]),
    ("eps", -1e-8, ["eps", "-", "at least 0"]),
    ("eps", INF, ["eps", "inf", "finite"]),
    ("eps", None, ["eps", "None", "number"]),
    ("weight_decay", -0.5, ["weight_decay", "-0.5", "at least 0"]),
    ("weight_decay", NAN, ["weight_decay", "NaN", "finite"]),
    ("weight_decay", None, ["weight_decay", "None", "number"]),
    ("min_8bit_size", -1, ["min_8bit_size", "-1", "at least 0"]),
    ("min_8bit_size", 2.5, ["min_8bit_size", "2.5", "whole number"]),
    ("min_8bit_size", True, ["min_8bit_size", "True", "whole number"]),
    ("min_8bit_size", "big", ["min_8bit_size", "'big'", "whole number"]),
    ("percentile_clipping", 0, ["percentile_clipping", "0", "at least 1 and at most 100"]),
    ("percentile_clipping", 101, ["percentile_clipping", "101", "at least 1 and at most 100"]),
    ("percentile_clipping", 50.5, ["percentile_clipping", "50.5", "whole number"]),
    ("optim_bits", 16, ["optim_bits", "16", "32 or 8"]),
    ("optim_bits", 0, ["optim_bits", "0", "32 or 8"]),
    ("optim_bits", "8", ["optim_bits", "'8'", "32 or 8"]),
    ("optim_bits", None, ["optim_bits", "None", "32 or 8"]),
    ("nonfinite", "ignore", ["nonfinite", "ignore", "skip.*propagate.*raise"]),
    ("nonfinite", None, ["nonfinite", "None", "skip.*propagate.*raise"]),
    ("state_code", "foo", ["state_code", "'foo'", '"dynamic" or "ratio"']),
    ("state_code", None, ["state_code", "None", '"dynamic" or "ratio"']),
    ("state_code", ["ratio"], ["state_code", r"\['ratio'\]", '"dynamic" or "ratio"']),
    ("nonfinite", 1, ["nonfinite", "1", "skip.*propagate.*raise"]),
]
BAD_IDS = [f"{name}={value!r}".replace("\n", "") for name, value, _ in BAD]


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=BAD_IDS)
@pytest.mark.parametrize("cls", [qadam.Adam, qadam.AdamW8bit])
def test_a_bad_value_is_an_error_naming_argument_value_and_what_is_accepted(
    cls, name, value, words
):
    with pytest.raises((ValueError, TypeError)) as caught:
        cls(one(), **{name: value})
    for word in words:
        assert caught.match(f"(?i){word}")


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, v, _ in BAD if n in ("lr", "betas", "eps", "weight_decay")]
)
def test_a_bad_value_in_a_group_is_an_error_too(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        qadam.AdamW([{"params": one(), name: value}])


@pytest.mark.parametrize(
    "good",
    [
        {"lr": 0.0},
        {"lr": 1},
        {"lr": torch.tensor(0.1)},
        {"betas": [0.5, 0.5]},
        {"betas": (0, 0)},
        {"eps": 0.0},
        {"weight_decay": 0},
        {"min_8bit_size": 0},
        {"percentile_clipping": 100},
        {"nonfinite": "raise"},
        {"state_code": "dynamic"},
        {"state_code": "ratio", "optim_bits": 8, "min_8bit_size": 0},
        {"nonfinite": "propagate"},
    ],
    ids=repr,
)
def test_values_at_the_edge_of_what_is_accepted_step(good):
    params = one()
    optimizer = qadam.AdamW(params, **good)
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert params[0].isfinite().all()
    assert optimizer.state[params[0]]["step"] == 1


def test_no_parameters_are_refused_as_torch_does():
    with pytest.raises(ValueError, match="empty parameter list"):
        qadam.Adam([])


def test_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert qadam.__version__ == version("qadam") == _core.version()


# Typing.

PACKAGE = Path(qadam.__file__).parent


def test_typing_markers_are_installed():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_core.pyi").is_file()


def stub():
    return ast.parse((PACKAGE / "_core.pyi").read_text())


def names_of(function):
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def test_stub_has_the_names_of_the_extension_module():
    declared = {n.name for n in stub().body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert declared == {name for name in vars(_core) if not name.startswith("__")}


@pytest.mark.parametrize(
    "function", [n for n in stub().body if isinstance(n, ast.FunctionDef)], ids=lambda n: n.name
)
def test_stub_has_the_functions_parameters(function):
    real = inspect.signature(getattr(_core, function.name))
    assert names_of(function) == list(real.parameters)


@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (c.name, m)
        for c in stub().body
        if isinstance(c, ast.ClassDef)
        for m in c.body
        if isinstance(m, ast.FunctionDef)
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_stub_has_the_methods_parameters(cls, method):
    cls = getattr(_core, cls)
    if method.name == "__new__":
        assert names_of(method)[1:] == list(inspect.signature(cls).parameters)
    else:
        assert names_of(method) == list(inspect.signature(getattr(cls, method.name)).parameters)


def test_stub_has_the_methods_of_the_classes():
    for cls in (n for n in stub().body if isinstance(n, ast.ClassDef)):
        declared = {m.name for m in cls.body if isinstance(m, ast.FunctionDef)}
        real = {n for n in vars(getattr(_core, cls.name)) if not n.startswith("__")}
        assert declared - {"__new__"} == real
