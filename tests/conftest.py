"""Property tests draw the same examples in every run; with --hypothesis-profile=fuzz, fresh ones."""

from hypothesis import settings

settings.register_profile("fuzz", derandomize=False)
settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")
