"""The wheel: what is in it, and that it works where nothing but its requirements is installed."""

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

import moe.version

ROOT = Path(__file__).parents[1]
OPTIONAL = ["triton", "transformers", "tokenizers", "matplotlib", "tensorboard", "gguf", "lm_eval"]


def run(*command: str | Path, cwd: Path) -> str:
    """Run outside the repository, deaf to PYTHONPATH; returns stdout, shows stderr when it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment that holds the wheel, torch and its like, and nothing optional.

    Torch is lent by this environment through a `.pth` file (a folder named there has its own `.pth` files
    ignored, so an editable install stays outside); the optional packages are made impossible to import.
    """
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    run(
        *(sys.executable, "-m", "pip", "--python", bin_folder / "python"),
        *("install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    site_packages = Path(
        run(
            bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))"
    (site_packages / "lent.pth").write_text("\n".join([block, *sorted(lent)]) + "\n", encoding="utf-8")
    return bin_folder


def python(bin_folder: Path, code: str, cwd: Path) -> str:
    return run(bin_folder / "python", "-I", "-c", textwrap.dedent(code), cwd=cwd)


def test_the_wheel_is_pure_python(wheel):
    assert wheel.name == f"sparse_moe-{moe.version.__version__}-py3-none-any.whl"


def test_the_wheel_holds_two_packages_the_licence_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [n for n in names if n.endswith(".dist-info/entry_points.txt")]
        declared = archive.read(entry_points).decode()
        assert "sparse-moe = moe.cli:main" in declared
        assert "[lm_eval.models]\nsparse_moe = moe.probes.lm_eval:SparseMoELM" in declared
        (licence,) = [n for n in names if n.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moe", "moe_triton"}
    shipped = {name for name in names if name.startswith("moe/") and name.endswith(".py")}
    assert shipped == {p.relative_to(ROOT).as_posix() for p in (ROOT / "moe").rglob("*.py")}


def test_the_wheel_imports_and_runs_with_nothing_optional_installed(empty_environment, tmp_path):
    code = """
        import moe, torch
        config = moe.MoEConfig(hidden_size=8, moe_intermediate_size=4, num_experts=4, num_experts_per_tok=2)
        out = moe.MoE(config)(torch.randn(3, 8))
        out.y.sum().backward()
        print(moe.__file__)
    """
    where = python(empty_environment, code, tmp_path).strip()
    assert Path(where).is_relative_to(empty_environment.parent)


def test_the_wheel_says_how_to_install_triton_where_it_is_missing(empty_environment, tmp_path):
    code = """
        from moe.ops.choose import choose_ops
        try:
            choose_ops("cuda", "triton")
        except RuntimeError as error:
            print(error)
        print(choose_ops("cuda", "auto") is choose_ops("cuda", "torch"))
    """
    message, falls_back = python(empty_environment, code, tmp_path).splitlines()
    assert "pip install triton" in message
    assert falls_back == "True"


def test_the_wheel_brings_no_package_called_kernels(empty_environment, tmp_path):
    find = "import importlib.util as u; s = u.find_spec('kernels')"
    code = f"{find}; print(*(s.submodule_search_locations if s else []))"
    for folder in python(empty_environment, code, tmp_path).split():
        assert not Path(folder).is_relative_to(empty_environment.parent)
        assert not Path(folder).is_relative_to(ROOT / "kernels")


def test_doctor_runs_with_nothing_optional_installed(empty_environment, tmp_path):
    assert "torch" in run(empty_environment / "sparse-moe", "doctor", cwd=tmp_path)
    assert "torch" in run(empty_environment / "python", "-m", "moe", "doctor", cwd=tmp_path)


def test_a_folder_called_kernels_never_hides_a_package_called_kernels():
    """Without __init__.py ours is a namespace at most, and any installed package comes before one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    origin = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels")


def test_importing_moe_imports_nothing_optional(tmp_path):
    code = f"""
        import sys, torch
        before = set(sys.modules)
        import moe
        print((set(sys.modules) - before) & set({[*OPTIONAL, "kernels"]}))
    """
    assert run(sys.executable, "-c", textwrap.dedent(code), cwd=tmp_path).strip() == "set()"


def test_the_changelog_names_the_version():
    headings = re.findall(
        r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0] == moe.version.__version__
