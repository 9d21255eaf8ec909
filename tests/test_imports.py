"""One direction of imports: the table of layers, read from the source of every module."""

import ast
from pathlib import Path

import pytest

import rgsp_jax

ROOT = Path(rgsp_jax.__file__).parent
PURE = (
    "types",
    "errors",
    "version",
    "method",
    "rules",
    "layouts",
    "batching",
    "linalg",
    "transport",
    "rgsp",
    "merging",
    "grafting",
    "similarity",
    "registry",
    "trees",
    "learning",
)
FOUNDATION = {"types", "errors", "version"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "version": set(),
    "method": {"types"},
    "rules": set(),
    "layouts": set(),
    "batching": set(),
    "linalg": FOUNDATION,
    "transport": FOUNDATION | {"linalg"},
    "rgsp": FOUNDATION | {"batching", "linalg", "transport", "method"},
    "merging": FOUNDATION | {"batching", "linalg", "transport", "method"},
    "grafting": FOUNDATION | {"linalg", "transport", "method"},
    "similarity": FOUNDATION | {"linalg"},
    "registry": {"method", "rgsp", "merging", "grafting"},
    "trees": {"method", "registry", "rules", "batching", "types"},
    "learning": FOUNDATION | {"batching", "rgsp", "method", "registry", "rules", "trees"},
    "models": FOUNDATION | {"layouts"},
    "checkpoint": FOUNDATION | {"layouts", "rules", "models"},
    "activations": set(PURE) | {"checkpoint", "models"},
    "pipeline": set(PURE) | {"checkpoint", "models"},
    "alignment": {"errors", "checkpoint"},
    "training": set(PURE) | {"checkpoint", "models", "activations", "pipeline"},
    "comparison": set(PURE) | {"checkpoint", "pipeline"},
    "demo": set(PURE) | {"checkpoint", "models", "pipeline"},
    "sweep": set(PURE) | {"checkpoint", "pipeline"},
    "cli": set(PURE) | {"checkpoint", "models", "activations", "alignment", "pipeline", "comparison", "demo", "sweep"},
}
ALLOWED["cli"] |= {"training"}
PURE_PACKAGES = {"jax", "jaxtyping", "ott", "optax", "numpy", "rgsp_jax"}
STANDARD = {
    "abc",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "inspect",
    "itertools",
    "math",
    "numbers",
}
STANDARD |= {"numbers", "operator", "re", "types", "typing", "warnings"}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module imported anywhere in a file, inside functions too; relative imports are refused."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_import_only_what_lies_below(path):
    layer = layer_of(path)
    used = {name.split(".")[1] if "." in name else "" for name in imported(path) if name.split(".")[0] == "rgsp_jax"}
    assert used - {layer} <= ALLOWED[layer], f"{path} imports {sorted(used - ALLOWED[layer] - {layer})}"


@pytest.mark.parametrize("path", [p for p in modules() if layer_of(p) in PURE], ids=lambda p: str(p.relative_to(ROOT)))
def test_pure_side_knows_no_files_and_no_frameworks(path):
    packages = {name.split(".")[0] for name in imported(path)}
    assert packages <= PURE_PACKAGES | STANDARD, sorted(packages - PURE_PACKAGES - STANDARD)


def test_the_table_names_every_layer():
    assert {layer_of(path) for path in modules()} == set(ALLOWED)


def test_a_forbidden_import_is_found(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("def f():\n    from rgsp_jax.pipeline import merge\n    import torch\n")
    assert imported(source) == {"rgsp_jax.pipeline", "torch"}
