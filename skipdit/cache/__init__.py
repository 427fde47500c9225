"""Skip-Cache: when to refresh (policy), what to remember (state), how it attaches (hook). Knows no network."""

from .config import SkipCacheConfig
from .foreign import check_foreign_cache
from .hook import SkipCacheHook
from .policy import IntervalPolicy, RefreshPolicy, StepListPolicy
from .state import CacheStats, SkipCacheState

__all__ = [
    "CacheStats",
    "IntervalPolicy",
    "RefreshPolicy",
    "SkipCacheConfig",
    "SkipCacheHook",
    "SkipCacheState",
    "StepListPolicy",
    "check_foreign_cache",
]
