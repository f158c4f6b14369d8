"""What must be learned or solved before a merge: coefficients, masks, statistics, merges that go layer by layer."""

from peta_fast.fit.regmean_pp import regmean_pp
from peta_fast.fit.statistics import Statistics, collect_statistics, load_statistics

__all__ = ["Statistics", "collect_statistics", "load_statistics", "regmean_pp"]
