#!/bin/sh
# Every kernel that this processor can run, under AddressSanitizer, against double precision:
#
#   kernels/asan.sh [CASES] [SEED]      default 1500 3; exits with 1 where a kernel errs or overreads
#
# The library is compiled from its sources into a folder that is gone afterwards.
set -eu
sources=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cxx=${CXX:-g++}
flags="-std=c++17 -O1 -g -fsanitize=address -fno-omit-frame-pointer -ffp-contract=fast"

# As in CMakeLists.txt, of which this is the short form for one processor.
case $(uname -m) in
  x86_64)
    avx2="-mavx2 -mfma -mf16c"
    avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
    isas="avx2 avx2vnni avx512vnni avx512bf16"
    ;;
  aarch64) isas="neon" ;;
  *) isas="" ;;
esac
flags_of() {
  case $1 in
    avx2) echo "$avx2" ;;
    avx2vnni) echo "$avx2 -mavxvnni" ;;
    avx512vnni) echo "$avx512" ;;
    avx512bf16) echo "$avx512 -mavx512bf16 -mavx512vbmi -mavx512vbmi2" ;;
    neon) echo "-march=armv8.2-a+dotprod+fp16" ;;
  esac
}
# What the processor lacks needs no compiling: dispatch.cpp would not choose it.
runs_here() {
  case $1 in
    neon) true ;;
    avx2) grep -qw avx2 /proc/cpuinfo ;;
    avx2vnni) grep -qw avx_vnni /proc/cpuinfo ;;
    avx512vnni) grep -qw avx512_vnni /proc/cpuinfo ;;
    avx512bf16) grep -qw avx512_bf16 /proc/cpuinfo && grep -qw avx512_vbmi2 /proc/cpuinfo ;;
  esac
}

have=""
for isa in $isas; do
  if runs_here "$isa"; then have="$have $isa"; fi
done
defined=$(for isa in $have; do printf ' -DACK_HAVE_%s' "$isa"; done | tr a-z A-Z | sed 's/-DACK/ -DACK/g')
for source in "$sources"/autocompress_kernels/csrc/*.cpp; do
  name=$(basename "$source" .cpp)
  isa=${name#isa_}
  case $name in
    isa_portable) own="" ;;
    isa_*) case " $have " in *" $isa "*) own=$(flags_of "$isa") ;; *) continue ;; esac ;;
    *) own="" ;;
  esac
  echo "compiling $name" >&2
  # shellcheck disable=SC2086
  $cxx $flags $defined $own -c "$source" -o "$out/$name.o"
done
# shellcheck disable=SC2086
$cxx $flags "$sources/check/check.cpp" "$out"/*.o -o "$out/check"
"$out/check" "${1:-1500}" "${2:-3}"
