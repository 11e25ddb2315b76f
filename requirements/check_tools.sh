#!/bin/sh
# Is everything here that pip cannot bring? Prints nothing when it is; otherwise names each
# missing tool with the Debian package that brings it, and exits with status 1.
#
#   check_tools.sh [PYTHON [CXX]]        defaults: python3 g++
python=${1:-python3}
compiler=${2:-g++}

# python3.12 has its own python3.12-venv and python3.12-dev; python3 has python3-venv and so on.
case ${python##*/} in
    python3.[0-9]*) package=${python##*/} ;;
    *) package=python3 ;;
esac

missing=
packages=
lacks() { # what, package
    missing="$missing  $1 (package $2)
"
    packages="$packages $2"
}

if ! command -v "$python" >/dev/null 2>&1; then
    lacks "$python, the Python interpreter, 3.10 or newer" "$package"
    lacks "the venv module of $python" "$package-venv"
    lacks "Python.h, the headers of $python" "$package-dev"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "sodfast needs Python 3.10 or newer, and $python is $("$python" --version 2>&1)." >&2
    echo "Debian 12 and Ubuntu 22.04 bring one in the package python3. If you have a newer" >&2
    echo "one beside $python, name it: make PYTHON=python3.12 ..." >&2
    exit 1
else
    # Debian ships the venv module without ensurepip unless python3-venv is installed.
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        lacks "the venv module of $python" "$package-venv"
    "$python" -c 'import os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(not os.path.exists(header))' ||
        lacks "Python.h, the headers of $python" "$package-dev"
fi

command -v "${compiler%% *}" >/dev/null 2>&1 || lacks "$compiler, the C++ compiler" "g++"

[ -z "$missing" ] && exit 0
{
    echo "sodfast cannot be built yet. Missing:"
    printf '%s' "$missing"
    echo "On Debian and Ubuntu:"
    echo "  sudo apt install$packages"
} >&2
exit 1
