#!/usr/bin/env bash
# Regenerate every lock in envs/ from its .in file: `make lock`. Names and versions only, no index address.
# The CPU locks need a CPU build of torch: from UV_FIND_LINKS where that is set, else from PyTorch's own CPU index.
set -euo pipefail
cd "$(dirname "$0")/../envs"
uv=${UV:-uv}
common=(pip compile -q --upgrade --python-version 3.11 --no-header --no-annotate)
common+=(--no-emit-index-url --no-emit-find-links)
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
cpu() { if [ -n "$links" ]; then UV_FIND_LINKS=$links "$uv" "${common[@]}" --excludes excludes-cpu.txt "$@"
        else "$uv" "${common[@]}" --excludes excludes-cpu.txt --torch-backend cpu "$@"; fi; }
cuda() { env -u UV_FIND_LINKS "$uv" "${common[@]}" --excludes excludes-cuda.txt "$@"; }
only=${1:-}
source=${only%-cpu}; source=${source%-cuda}
if [ -n "$only" ] && [ ! -f "$only.in" ] && [ ! -f "$source.in" ]; then
  echo "no lock named $only; there are: $(ls ./*.txt | xargs -n1 basename -s .txt | tr '\n' ' ')" >&2; exit 2
fi
# Envoy is built for glibc 2.31 and newer, everything else for 2.28.
glibc() { if [ "$1" = router ]; then echo 2_31; else echo 2_28; fi; }
lock() { if [ -z "$only" ] || [ "$only" = "$2" ]; then echo "envs/$2.txt"
         "$1" --python-platform "x86_64-manylinux_$(glibc "$3")" "$3.in" -o "$2.txt"; fi; }
lock cpu core core
lock cpu docs docs
for name in $(ls ./*.in | xargs -n1 basename -s .in | grep -v -e ^core$ -e ^docs$ -e ^vllm-); do
  lock cpu "$name-cpu" "$name"
  lock cuda "$name-cuda" "$name"
done
lock cpu vllm-cpu vllm-cpu
lock cuda vllm-cuda vllm-cuda
