"""Property tests without a deadline: the first call of a JAX function compiles it."""

from hypothesis import settings

settings.register_profile("compiling", deadline=None)
settings.load_profile("compiling")
