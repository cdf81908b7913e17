"""The trainer and its parts: state, optimiser, sharding, checkpoints, metrics, loop.

Nothing here knows a mixer or a task: models and objectives come in as functions, meshes and files stay here.
"""
