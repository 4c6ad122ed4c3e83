"""Settings every test shares."""

from __future__ import annotations

import os

# One thread a process, decided before torch is imported: the tests' models are too small to gain from
# more, and several processes on few cores would wait for one another. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

# No deadline: on a busy machine a slow example is no fault. Derandomised: the same tests every time.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
