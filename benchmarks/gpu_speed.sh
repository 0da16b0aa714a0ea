#!/usr/bin/env bash
# gpu_speed.sh MODEL [STEP ...] [OVERRIDE ...]: float against AWQ and GPTQ at 4 bits on a GPU machine without a network, by the stages
# themselves; see gpu_speed.py. Beside the checkout it needs wheels packed in .gpu/: core.part-* of gpu_core.txt, and
# vllm.part-* of vLLM without its torch; and a python3 that has torch and transformers. Results go to $OUT where that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
for name in core vllm; do
  [ -d ".gpu/$name" ] || cat ".gpu/$name".part-* | xz -d -T8 | tar -C .gpu -xf -
done
env=$PWD/.gpu/env
if [ ! -x "$env/bin/python" ]; then
  python3 -m venv --system-site-packages --without-pip "$env"
  # The packs come first; all other packages come from the machine's python3.
  python3 - "$env" "$PWD/.gpu/core" "$PWD/.gpu/vllm" <<'PATHS'
import pathlib, sys
env, *packs = sys.argv[1:]
lines = [f"import sys; sys.path.insert(1, {pack!r})" for pack in packs]
lines += [f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("-packages")]
(folder,) = pathlib.Path(env).glob("lib/python*/site-packages")
(folder / "packs.pth").write_text("\n".join(lines) + "\n")
PATHS
fi
export VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1
exec "$env/bin/python" -m benchmarks.gpu_speed "$@"
