"""Who runs next, and how much of each request in a step."""

from kvloom.engine.scheduling.order import ORDERS
from kvloom.engine.scheduling.scheduler import LOOK_UP_COST, Chunk, Scheduler, StepPlan

__all__ = ["LOOK_UP_COST", "ORDERS", "Chunk", "Scheduler", "StepPlan"]
