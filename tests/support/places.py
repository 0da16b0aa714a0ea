"""Where a planned variant is to run: a CPU and a GPU with the same server and backends."""

from __future__ import annotations

from quantline.planning.spec import Machine
from quantline.serving.rules import Target

ORDER = {"awq": ["autoawq"], "gptq": ["auto_gptq"], "rtn": ["native"]}
CPU = Target("vllm", "0.32.0", "cpu", instructions="avx512")
GPU = Target("vllm", "0.32.0", "cuda", compute_capability=90)
HERE, THERE = Machine(CPU, ORDER), Machine(GPU, ORDER)
