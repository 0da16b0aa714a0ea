#!/usr/bin/env bash
# two_gpus.sh [PART ...] [NAME=VALUE ...]: benchmarks.two_gpus on a machine of two GPUs without a network. Beside the checkout it
# needs wheels packed in .gpu/: core.part-* of gpu_core.txt and DVC, vllm.part-* of vLLM without its torch, modern.part-* of
# llm-compressor; and a python3 that has torch and transformers. Results go to $OUT where that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
for name in core vllm modern; do
  [ -d ".gpu/$name" ] || cat ".gpu/$name".part-* | xz -d -T8 | tar -C .gpu -xf -
done
environment() {  # NAME PACK...: an interpreter that sees these packs, in this order, and then the machine's packages
  local env=$PWD/.gpu/env_$1; shift
  [ -x "$env/bin/python" ] && return
  python3 -m venv --system-site-packages --without-pip "$env"
  python3 - "$env" "$@" <<'PATHS'
import pathlib, sys
env, *packs = sys.argv[1:]
lines = [f"import sys; sys.path.insert(1, {str(pathlib.Path('.gpu', pack).resolve())!r})" for pack in reversed(packs)]
lines += [f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("-packages")]
(folder,) = pathlib.Path(env).glob("lib/python*/site-packages")
(folder / "packs.pth").write_text("\n".join(lines) + "\n")
PATHS
}
environment core core vllm
environment vllm vllm
environment modern modern vllm
export VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1 NCCL_SOCKET_IFNAME=lo
python=$PWD/.gpu/env
exec "${python}_core/bin/python" -m benchmarks.two_gpus "$@" device=cuda toolchains.vllm="${python}_vllm/bin/python" \
  toolchains.reference="${python}_vllm/bin/python" toolchains.llmcompressor="${python}_modern/bin/python"
