"""What the service withstands, and what it costs, each kind a result file in ``research/results/service``.

fuzz: Schemathesis on the service's own description; no 5xx, no hang. load: twice what it can answer. faults: tasks
exchanged, and the service stopped, while many ask; slow callers, wrong ones, broken files. speed: beside the engine
itself and a server that runs a pipeline for each task.
"""
