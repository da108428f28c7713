"""Measuring: servers under load, the engine alone, methods beside each other. A room for each kind of work.

    study          what every measurement has: flags, the runner of studies, rows and tables, intervals, pictures
    client         requests, when they are sent and what came of them; servers that are started or looked at
    workloads      what is sent
    load           `kvloom bench serve`: a load test, from its command line to its files
    report         `kvloom bench report`: runs alone and beside each other
    sweep          `kvloom bench sweep`: a grid of server settings under load
    bench          `kvloom bench engine`, `kernels`, `floods` and `peers`
    quality        `kvloom eval`: what methods, weights and reuse cost in quality
    calibrations   `kvloom calibrate`: fitting a method to a model
    gpu_check      `python -m kvloom.loadtest.gpu_check`: all that has to be seen on a GPU, in eight minutes
    fuzz           `python -m kvloom.loadtest.fuzz`: random requests through engines of many settings

Beside them: the figures of the documents (`figures`), the demo, and the scheduler over a make-believe model.
"""
