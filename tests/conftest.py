import os

from hypothesis import HealthCheck, settings

# NumPy and SciPy bring an OpenBLAS each; on matrices as small as a test's their two pools of spinning threads
# only wait for each other, up to ten times longer on busy cores. Read when NumPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The same examples in every run; no deadline, since the first call of a compiled backend compiles.
settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
# Other examples in every run: ``--hypothesis-profile explore``. A failure is printed with what reproduces it.
settings.register_profile(
    "explore", settings.get_profile("deterministic"), derandomize=False, print_blob=True
)
settings.load_profile("deterministic")
