from hypothesis import HealthCheck, settings

# The same examples in every run; no deadline, since the first call of a compiled backend compiles.
settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
settings.load_profile("deterministic")
