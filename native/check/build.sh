#!/usr/bin/env bash
# build.sh COMPILER OUT "SET:FLAGS"…: the check program with the kernels of these instruction sets.
set -euo pipefail
compiler=$1 out=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shift 2
flags="-std=c++17 -O3 -ffp-contract=off -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -fno-tree-loop-distribute-patterns"
mkdir -p "$out"
objects=()
for set in "$@"; do
  name=${set%%:*}
  # shellcheck disable=SC2086
  "$compiler" $flags ${set#*:} -DBEDPLATE_ISA="$name" -c kernels.cpp -o "$out/kernels_$name.o"
  objects+=("$out/kernels_$name.o")
done
# shellcheck disable=SC2086
"$compiler" $flags -static -pthread check/kernels_check.cpp matrix.cpp instruction_sets.cpp "${objects[@]}" -o "$out/kernels_check"
