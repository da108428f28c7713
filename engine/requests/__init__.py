"""What is ordered and what becomes of it: requests, the plan of a step, who takes part in their lives, what is counted."""
