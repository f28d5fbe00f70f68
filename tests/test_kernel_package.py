"""The folder for the kernel hub: it is whole, `kernels` loads it, and it computes what moe_triton does."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("package_kernels", ROOT / "kernels" / "package.py")
assert SPEC is not None and SPEC.loader is not None
package = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(package)

HAS_HUB = find_spec("kernels") is not None and find_spec("kernels").origin is not None  # type: ignore[union-attr]
needs_hub = pytest.mark.skipif(not HAS_HUB, reason="needs the kernels package of Hugging Face")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package")


def in_a_process(code: str, *arguments: Path) -> str:
    """Run code where the kernels are interpreted and no hub can be reached; returns what it printed."""
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "triton"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "upgrad" not in done.stderr, done.stderr  # of a file that is in an older form
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("package") / "moe-triton"
    package.build_package(where, ("cuda", "rocm", "cpu"))
    return where


def test_each_variant_holds_every_file_of_the_package(folder):
    source = ROOT / "kernels" / "moe_triton"
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix in (".py", ".json")}
    assert "tables/sm_90.json" in files
    for backend in ("cuda", "rocm", "cpu"):
        variant = folder / "build" / f"torch-{backend}"
        found = {p.relative_to(variant).as_posix() for p in variant.rglob("*") if p.is_file()}
        assert found == files | {"_ops.py", "metadata.json"}
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "experts_ffn" in (folder / "README.md").read_text(encoding="utf-8")


def test_only_the_names_of_the_operators_differ_from_the_package(folder):
    for path in (ROOT / "kernels" / "moe_triton").glob("*.py"):
        hub = (folder / "build" / "torch-cuda" / path.name).read_text(encoding="utf-8").splitlines()
        ours = path.read_text(encoding="utf-8").splitlines()
        changed = [line for line in hub if line not in ours]
        assert all("add_op_namespace_prefix" in line for line in changed), changed
        operators = sum("custom_op(" in line for line in ours)
        assert len(changed) == operators + bool(operators)  # each operator, and the import of the prefix
        assert not any("moe_triton::" in line for line in hub)


def test_variants_differ_in_their_namespace_and_metadata_alone(folder):
    names = set()
    for backend in ("cuda", "rocm", "cpu"):
        metadata = json.loads((folder / "build" / f"torch-{backend}" / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["name"] == "moe-triton"
        names.add(metadata["id"])
    assert len(names) == 3 and all(name.startswith("_moe_triton_") for name in names)


def test_the_namespace_follows_the_sources():
    sources = package.hub_sources()
    changed = sources | {"rows.py": sources["rows.py"] + "\n# another build\n"}
    assert package.unique_id(sources) == package.unique_id(dict(reversed(sources.items())))
    assert package.unique_id(sources) != package.unique_id(changed)


@needs_hub
def test_the_kernels_package_reads_metadata_and_build_file(folder):
    code = """
        import sys
        from pathlib import Path
        from kernels._rust import Build, Metadata
        folder = Path(sys.argv[1])
        backends = [str(backend) for backend in Build.open(folder).general.backends]
        metadata = Metadata.read_from_file(folder / "build" / "torch-rocm" / "metadata.json")
        print(*backends, metadata.name.python_name, metadata.backend.backend_type, metadata.license)
    """
    assert in_a_process(code, folder).split() == ["cuda", "rocm", "cpu", "moe_triton", "rocm", "apache-2.0"]
    with (folder / "build.toml").open("rb") as file:
        assert tomllib.load(file)["torch-noarch"] == {}


@needs_hub
@needs_triton
def test_the_loaded_kernels_give_the_value_and_every_gradient_beside_moe_triton(folder):
    """Two builds and the installed package in one process, and none disturbs another."""
    code = """
        import sys, warnings
        from pathlib import Path
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        import moe_triton
        from accuracy import assert_same_bits, assert_solved, expected, kernels, solve_here
        from helpers import by_ops, drop, make_problem, random_experts
        from kernels import get_local_kernel
        import torch
        folder = Path(sys.argv[1])
        builds = [get_local_kernel(folder, backend="cpu"), get_local_kernel(folder / "build" / "torch-cuda")]
        experts = drop(random_experts(11, 2, 5, among=range(4)), 5, tokens=(2,), pairs=((4, 0),))
        problem = make_problem(experts, 5, dtype=torch.float32)
        answers = expected(problem)
        for build in builds:
            assert build is not moe_triton and build.__all__ == moe_triton.__all__
            ours = solve_here(by_ops(build), problem)
            assert len(ours) == 7
            assert_solved(ours, answers)
            assert_same_bits(ours, kernels(problem))
            namespace = build.__name__
            assert hasattr(getattr(torch.ops, namespace), "experts_ffn")
        compiled = torch.compile(by_ops(builds[0]), backend="aot_eager", fullgraph=True)
        y = compiled(problem, **problem.leaves)
        assert torch.equal(y, by_ops(moe_triton)(problem, **problem.leaves))
        print("done", len({build.__name__ for build in builds}))
    """
    assert in_a_process(code, folder).split() == ["done", "2"]


def test_a_folder_of_our_own_is_replaced_and_another_is_refused(folder, tmp_path):
    ours = tmp_path / "ours"
    package.build_package(ours, ("cpu",))
    (variant,) = package.build_package(ours, ("cuda",))
    assert variant.is_dir() and not (ours / "build" / "torch-cpu").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("work of years")
    with pytest.raises(ValueError, match="holds something else"):
        package.build_package(tmp_path / "theirs")
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "theirs"}


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'abacus'"):
        package.build_package(tmp_path / "new", ("abacus",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import numpy as np\n", "imports numpy"),
        ("def f():\n    from moe.ops import reference\n", "imports moe.ops"),
        ('name = "moe_triton::up"\n', "moe_triton::up"),
    ],
)
def test_sources_that_would_not_work_in_the_hub_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        package._hub_source("new.py", text)


def test_the_command_writes_the_published_variants_and_needs_no_package(tmp_path):
    alone = [sys.executable, "-I", "-S"]  # without what is installed
    command = [*alone, ROOT / "kernels" / "package.py", tmp_path / "new"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [Path(line).name for line in done.stdout.splitlines()]
    assert (
        names
        == ["torch-cuda", "torch-rocm"]
        == sorted(p.name for p in (tmp_path / "new" / "build").iterdir())
    )
