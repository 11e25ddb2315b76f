"""Builds sodfast._C (and _C_cuda, see CMakeLists.txt) against the torch that is installed.

No network, no GPU probing; CMakeLists.txt says what is built.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NEEDS = "pip install 'torch>=2.11' 'setuptools>=77' cmake ninja pybind11"


def package_folder(name: str) -> Path:
    """Where a package lies, found without importing it (torch takes seconds)."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"sodfast needs {name} to build: {NEEDS}, then pip install --no-build-isolation .")
    return Path(spec.origin).parent


def version() -> str:
    """The version that sodfast/__init__.py holds."""
    text = (HERE / "sodfast" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"', text, re.MULTILINE)[0]


class CMakeBuild(build_ext):
    """Hands the extension to CMake; setuptools only says where the result belongs."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = HERE / "build" / str(sys.implementation.cache_tag)
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": package_folder("pybind11") / "share" / "cmake" / "pybind11",
            "TORCH_DIR": package_folder("torch"),
            "SODFAST_VERSION": version(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
        }
        configure = ["cmake", "-S", str(HERE), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += os.environ.get("SODFAST_CMAKE_ARGS", "").split()
        # cmake and ninja from pip lie beside the interpreter, also in an environment that is
        # not activated.
        beside = str(Path(sys.executable).parent)
        environment = {**os.environ, "PATH": beside + os.pathsep + os.environ.get("PATH", "")}
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                subprocess.run(command, check=True, env=environment)
            except FileNotFoundError:
                sys.exit(f"sodfast needs cmake and ninja to build: {NEEDS}")
            except subprocess.CalledProcessError:
                sys.exit("sodfast: building sodfast._C failed; the lines above say why")

    def copy_extensions_to_source(self) -> None:
        """In an editable install, also what setuptools knows nothing of."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib).resolve() / "sodfast"
        for module in built.glob("_C_cuda.*"):
            self.copy_file(str(module), str(HERE / "sodfast" / module.name))
        for folder in ("lib", "include"):  # the C library
            shutil.copytree(built / folder, HERE / "sodfast" / folder, dirs_exist_ok=True)


setup(
    ext_modules=[Extension("sodfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
