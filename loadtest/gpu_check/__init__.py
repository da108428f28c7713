"""`python -m kvloom.loadtest.gpu_check` (`make gpu-check`): all that has to be seen on a GPU, in under eight minutes.

Needs torch, triton and numpy, and nothing else: no network, no model's files, no tokenizer. See `__main__`.
"""
