"""What is sent: workloads by name. `build` makes the jobs of one."""

from kvloom.loadtest.workloads.base import Workload
from kvloom.loadtest.workloads.cancel_storm import CANCEL_STORM
from kvloom.loadtest.workloads.edited import EDITED
from kvloom.loadtest.workloads.file import FILE
from kvloom.loadtest.workloads.multi_turn import MULTI_TURN
from kvloom.loadtest.workloads.needle import NEEDLE
from kvloom.loadtest.workloads.rag import RAG
from kvloom.loadtest.workloads.random_ids import RANDOM
from kvloom.loadtest.workloads.shared_prefix import SHARED_PREFIX
from kvloom.loadtest.workloads.tenants import TENANTS
from kvloom.loadtest.workloads.trace import TRACE

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (RANDOM, SHARED_PREFIX, MULTI_TURN, RAG, EDITED, NEEDLE, TENANTS, CANCEL_STORM, TRACE, FILE)
}
"""Every workload by its name on the command line."""

__all__ = ["WORKLOADS", "Workload"]
