#!/usr/bin/env bash
# Runs the tests of the native operations, and of the CUDA kernels built for the host, under AddressSanitizer, then under
# UndefinedBehaviorSanitizer.
#
#   tests/sanitize.sh PYTHON [pytest options]
#
# PYTHON is that of an environment with the package's `test` extra, pybind11 and setuptools. The module is built in a
# temporary copy of the checkout; neither the checkout nor the environment is touched.
set -euo pipefail
python=$(realpath --no-symlinks "${1:?the path of a python, such as .venv/bin/python}")
shift
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root"/{setup.py,pyproject.toml,README.md,csrc,peta_fast,tests} "$copy"
cd "$copy"
export PYTHONPATH=$copy PETA_FAST_NATIVE=require
export ASAN_OPTIONS=detect_leaks=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

failed=0
for sanitizer in address undefined; do
  rm -rf build peta_fast/*.so
  export PETA_FAST_SANITIZE=$sanitizer
  PETA_FAST_CUDA=off "$python" setup.py -q build_ext --inplace
  case $sanitizer in address) runtime=libasan.so ;; undefined) runtime=libubsan.so ;; esac
  echo "== $sanitizer"
  # The C++ library beside it, or exceptions that leave the module would not find their way.
  LD_PRELOAD="$(gcc -print-file-name=$runtime) $(gcc -print-file-name=libstdc++.so)" "$python" -m pytest -q "$@" \
    tests/test_delta_merge*.py tests/test_order_statistics.py tests/test_task_statistics.py tests/test_checksum.py \
    tests/test_merge_variants.py tests/test_native_module.py tests/test_concrete_mask_memory.py tests/test_factors.py \
    tests/test_cuda_host.py tests/test_cuda_files.py \
    || failed=1
done
exit $failed
