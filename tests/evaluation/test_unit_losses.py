from __future__ import annotations

from pathlib import Path

from quantline.evaluation.unit_losses import Grids, draw, measure, read, write
from quantline.toolchains.protocol import JobResult


def test_units_and_grids_are_asked_for_and_the_table_is_read_back(tmp_path):
    jobs = []

    def worker(toolchain, module, job, label):
        jobs.append(job)
        rows = [
            {"unit": unit, "bits": grid["bits"], "group_size": grid["group_size"], "kl": 1 / 3 / grid["bits"]}
            for unit in job["units"] for grid in job["grids"]
        ]  # fmt: skip
        return JobResult({"rows": rows, "tokens": 64}, 1.0, 0)

    names = ["a.q_proj", "a.k_proj", "a.o_proj"]
    rows, metrics = measure(
        Path("model"),
        names,
        Grids((4, 8), 64, symmetric=True),
        Path("tokens"),
        2,
        device="cpu",
        threads=1,
        run_worker=worker,
    )
    assert jobs[0]["units"] == {"a.q_proj+k_proj": names[:2], "a.o_proj": names[2:]}
    assert jobs[0]["grids"] == [{"bits": bits, "group_size": 64, "symmetric": True} for bits in (4, 8)]
    assert metrics == {"units": 2, "probes": 4, "tokens": 64}
    write(rows, tmp_path)
    assert read(tmp_path) == {(row["unit"], row["bits"]): row["kl"] for row in rows}
    assert read(tmp_path)["a.o_proj", 4] == 0.0833333


def test_a_heat_map_is_drawn_for_each_width(tmp_path):
    rows = [
        {"unit": f"model.layers.{layer}.self_attn.{unit}", "bits": bits, "kl": layer / bits}
        for layer in range(2) for unit in ("q_proj+k_proj+v_proj", "o_proj") for bits in (4, 8)
    ]  # fmt: skip
    assert draw(rows, tmp_path) == ["units-w4.png", "units-w8.png"]
    assert (tmp_path / "units-w4.png").read_bytes()[:4] == b"\x89PNG"
