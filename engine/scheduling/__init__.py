"""Who runs next, and how much of each request in a step."""

from kvloom.engine.requests.plan import Chunk, StepPlan
from kvloom.engine.scheduling.order import ORDERS
from kvloom.engine.scheduling.scheduler import Scheduler

__all__ = ["ORDERS", "Chunk", "Scheduler", "StepPlan"]
