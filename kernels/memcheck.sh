#!/bin/sh
# Every kernel that this processor can run, under valgrind, against double precision:
#
#   kernels/memcheck.sh [CASES] [SEED]      default 150 3: two minutes; exits with 1 or 9 on an error
#
# Takes the library that is built beside the Python files.
set -eu
kernels=$(cd "$(dirname "$0")" && pwd)
library=$kernels/autocompress_kernels/libautocompress_kernels.so
[ -e "$library" ] || { echo "there must be a library at $library. Got none. Build it." >&2; exit 2; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"${CXX:-g++}" -std=c++17 -O1 -g "$kernels/check/check.cpp" "$library" -o "$out/check" \
  -Wl,-rpath,"$kernels/autocompress_kernels"
valgrind -q --error-exitcode=9 "$out/check" "${1:-150}" "${2:-3}"
