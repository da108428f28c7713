"""What is sent: workloads by name. `build` makes the jobs of one."""

from kvloom.loadtest.workloads import checked, file, synthetic, trace
from kvloom.loadtest.workloads.base import Workload

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        synthetic.random_ids, synthetic.shared_prefix, synthetic.multi_turn, checked.rag, synthetic.edited, checked.needle,
        synthetic.tenants, synthetic.cancel_storm, trace.trace, file.file,
    )
}  # fmt: skip
"""Every workload by its name on the command line."""

__all__ = ["WORKLOADS", "Workload"]
