#!/usr/bin/env bash
# An emulated Raspberry Pi 4 (Cortex-A72): Debian's arm64 Python, wheels for aarch64, and a cross compiler, unpacked into
# the folder $1.
# Needs Debian 12 and the package registries of Debian and PyPI; no root, nothing outside the folder is changed.
set -euo pipefail
arm=$(mkdir -p "$1" && cd "$1" && pwd)
python=${2:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)
[ ! -e "$arm/.ready" ] || exit 0

fail() {
    echo "make test-arm cannot be set up: $1" >&2
    exit 1
}
for tool in apt-get dpkg; do
    command -v "$tool" > /dev/null || fail "$tool is missing; run it on Debian 12."
done

# libc6 and libstdc++6 bring libraries; python3.11 its standard library; the rest is what that links against.
packages="libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 \
python3.11-minimal libpython3.11-minimal libpython3.11-stdlib"
fetch() { # architecture, packages...
    local architecture=$1 lists="$arm/lists-$1"
    shift
    mkdir -p "$lists/partial" "$arm/debs"
    local apt="apt-get -qq -oAPT::Architecture=$architecture -oAPT::Architectures=$architecture \
        -oDir::State::Lists=$lists -oDir::Etc::SourceParts=/dev/null -oDir::Etc::SourceList=$arm/sources.list"
    $apt update && (cd "$arm/debs" && $apt download "$@")
}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main" \
    > "$arm/sources.list"
# shellcheck disable=SC2086
fetch arm64 $packages || fail "Debian's arm64 packages could not be fetched."
fetch "$(dpkg --print-architecture)" qemu-user-static || fail "Debian's qemu-user-static could not be fetched."
for deb in "$arm"/debs/*.deb; do
    dpkg -x "$deb" "$arm/root"
done

# onnxruntime 1.31 crashes on import under qemu 7.2; 1.23.2 is the newest known to run there.
# shellcheck disable=SC2046
"$python" -m pip download --quiet --only-binary=:all: --no-deps --implementation cp --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 --dest "$arm/wheels" \
    onnxruntime==1.23.2 $(grep -E '^(numpy|tokenizers)==' "$root/constraints.txt") || fail "aarch64 wheels could not be fetched from PyPI."
mkdir -p "$arm/root/site"
for wheel in "$arm"/wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" "$arm/root/site"
done
# A cross compiler for the kernels: Clang, as the package ziglang brings it.
"$python" -m pip install --quiet --disable-pip-version-check --only-binary=:all: --no-deps --target "$arm/zig" \
    "$(grep '^ziglang==' "$root/constraints.txt")" || fail "the package ziglang could not be fetched from PyPI."
touch "$arm/.ready"
