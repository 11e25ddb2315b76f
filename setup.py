"""Builds sodfast._C with CMake and Ninja against the torch that is installed; no network, no GPU probing."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "sodfast/__init__.py").read_text(), re.M).group(1)


def torch_folder() -> Path:
    """torch's package folder, found without importing it."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("sodfast needs torch to build: pip install 'torch>=2.11', then pip install --no-build-isolation .")
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    """Hands the one extension to CMake; setuptools only says where the result belongs."""

    def build_extension(self, extension: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            sys.exit("sodfast needs pybind11, cmake and ninja to build: pip install pybind11 cmake ninja")
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = HERE / "build" / f"{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(HERE), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_DIR={torch_folder()}",
            f"-DSODFAST_VERSION={VERSION}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            *os.environ.get("SODFAST_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except FileNotFoundError:
            sys.exit("sodfast needs cmake and ninja to build: pip install cmake ninja")
        except subprocess.CalledProcessError as error:
            sys.exit(f"sodfast: the build of sodfast._C failed (see above): {' '.join(error.cmd[:3])} …")


setup(ext_modules=[Extension("sodfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
