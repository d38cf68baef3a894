#!/usr/bin/env bash
# Test the CPU kernels for aarch64 (NEON) in an emulator: tools/test_aarch64.sh FOLDER TEST ...
#
# The kernels are cross-compiled by GCC, and run by QEMU with a Python from Debian and a PyTorch from
# the package index, both for aarch64. They stay in FOLDER, and take 5 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
shift

need() {
  command -v "$1" >/dev/null || { echo "$1 is needed: on Debian, install $2" >&2; exit 2; }
}
need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
need qemu-aarch64-static qemu-user-static
need apt-get "this program, which downloads packages of another architecture"

mkdir -p "$folder"
folder=$(realpath "$folder")
root=$folder/root site=$folder/site lib=$folder/lib

if [ ! -e "$folder/.python" ]; then
  mkdir -p "$folder"/apt/{lists/partial,archives/partial,packages} "$root"
  # Separate from the package lists of this system, which may not know the architecture.
  apt=(-o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root
       -o Dir::State="$folder/apt" -o Dir::Cache="$folder/apt" -o Dir::State::status=/dev/null)
  apt-get -qq "${apt[@]}" update
  python=$(apt-cache "${apt[@]}" depends python3-minimal | grep -om1 'python3\.[0-9]*')
  packages=$(apt-cache "${apt[@]}" depends --recurse --no-recommends --no-suggests --no-conflicts \
    --no-breaks --no-replaces --no-enhances "$python-minimal" "lib$python-stdlib" libstdc++6 libgomp1 |
    grep '^[a-z]' | grep -v '^perl\|^libperl\|^dpkg\|^tar' | sort -u)
  # shellcheck disable=SC2086
  (cd "$folder/apt/packages" && apt-get -qq "${apt[@]}" download $packages)
  for package in "$folder"/apt/packages/*.deb; do dpkg -x "$package" "$root"; done
  rm -r "$folder/apt"
  echo "$python" >"$folder/.python"
fi
python=$(cat "$folder/.python")

if [ ! -e "$folder/.packages" ]; then
  rm -rf "$site"
  platforms=(--platform manylinux2014_aarch64)
  for glibc in 17 18 24 25 26 27 28; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  python3 -m pip install --quiet --only-binary :all: --python-version "${python#python}" \
    "${platforms[@]}" --target "$site" -c requirements.txt -c requirements-dev.txt \
    torch numpy pytest hypothesis expecttest
  touch "$folder/.packages"
fi

rm -rf "$lib" && mkdir -p "$lib/objects"
cp -r ops_dcnv4/ops_dcnv4 "$lib"
rm -f "$lib"/ops_dcnv4/*.so
target=$(python3 -c 'import re; print("0x%02x%02x" % tuple(map(int, re.search(
  r"^MINIMUM_TORCH = \((\d+), (\d+)\)", open("ops_dcnv4/setup.py").read(), re.M).groups())))')
objects=()
for source in ops_dcnv4/csrc/*.cpp ops_dcnv4/csrc/cpu/*.cpp; do
  objects+=("$lib/objects/$(basename "$source" .cpp).o")
  aarch64-linux-gnu-g++ -std=c++20 -O3 -fno-math-errno -fno-trapping-math -fvisibility=hidden -fPIC \
    -Wall -Wno-psabi -DNDEBUG "-DTORCH_TARGET_VERSION=${target}000000000000" -Iops_dcnv4/csrc \
    -isystem "$site/torch/include" -isystem "$site/torch/include/torch/csrc/api/include" \
    -c "$source" -o "${objects[-1]}"
done
aarch64-linux-gnu-g++ -shared "${objects[@]}" -L"$site/torch/lib" -ltorch -ltorch_cpu -lc10 \
  -Wl,--unresolved-symbols=ignore-in-shared-libs -o "$lib/ops_dcnv4/_C.abi3.so"

run() {
  OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$lib:$site" \
    qemu-aarch64-static -L "$root" "$root/usr/bin/$python" "$@"
}
run -c 'import ops_dcnv4, sys; print(ops_dcnv4.explain_backend("cpu")); sys.exit(not ops_dcnv4.is_compiled())'
# The profile tolerates that emulation is slow.
run -m pytest -q -p no:cacheprovider --hypothesis-profile ci "$@"
